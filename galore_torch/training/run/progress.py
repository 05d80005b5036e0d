"""How far something is: one line with a bar in a terminal, plain lines elsewhere."""

# ruff: noqa: ARG002 - a callback takes whatever the Trainer hands to every callback

from __future__ import annotations

from typing import Any

import datasets
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging as transformers_logging

from galore_torch.optim import state_bytes
from galore_torch.training.run.callbacks import Recorder
from galore_torch.units import duration, readable

PLAIN_LINES = 20
"""How many lines show a run where there is no terminal."""

_PACES = {"tokens": "tok/s", "examples": "examples/s"}
_JUDGED = {"tokens": "text", "examples": "rows"}


def quiet(console: Console) -> None:
    """Leave the screen to our own display; Datasets' bars stay in a terminal, for large data."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.logging.set_verbosity_error()
    if not console.is_terminal or console.quiet:
        datasets.disable_progress_bars()


def progress_bar(console: Console, *columns: str | ProgressColumn) -> Progress:
    """Bars as all commands have them: as wide as the terminal, gone when they stop, and nothing elsewhere."""
    return Progress(*columns, console=console, expand=True, transient=True, disable=not console.is_terminal)


class StepProgress(TrainerCallback):
    """Shows the steps of a Trainer with loss, learning rate, pace, optimizer state and the time that is left.

    Args:
        console: where.
        recorder: of the run, whose evaluations are lines too; if None, only the loss is shown.
        steps: how many there will be, if fewer than the Trainer expects.
    """

    def __init__(self, console: Console, recorder: Recorder | None = None, steps: int | None = None) -> None:
        self._console, self._recorder, self._steps = console, recorder, steps
        columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bar = progress_bar(console, *columns, TimeRemainingColumn(), TextColumn("left"))
        self._task = self._bar.add_task("starting")

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw the bar."""
        self._bar.update(self._task, total=self._steps or state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show a step."""
        logs, recorder, step = kwargs.get("logs") or {}, self._recorder, state.global_step
        if "loss" not in logs:
            return
        text = f"loss {logs['loss']:.3f}"
        if recorder is not None:
            pace = f"{recorder.step[f'{recorder.unit}_per_second']:,.0f} {_PACES[recorder.unit]}"
            state_size = readable(state_bytes(kwargs["optimizer"]))
            text += f"  lr {logs['learning_rate']:.1e}  {pace}  state {state_size}"
        self._bar.update(self._task, completed=step, description=text)
        total, left = self._steps or state.max_steps, self._bar.tasks[self._task].time_remaining
        if not self._console.is_terminal and (step == 1 or step % max(1, total // PLAIN_LINES) == 0):
            end = "" if left is None else f"  {duration(left)} left"
            self._console.print(f"step {step}/{total}  {text}{end}", soft_wrap=True)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Print an evaluation."""
        if self._recorder is not None:
            named = self._recorder.scores.items()
            scores = ", ".join(f"{name} {score:{',.2f' if score >= 10 else '.4f'}}" for name, score in named)
            judged = _JUDGED[self._recorder.unit]
            self._console.print(f"step {state.global_step}/{state.max_steps}  {scores} on held-out {judged}")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the bar away."""
        self.stop()

    def stop(self) -> None:
        """Take the bar away, also where an error or a signal has ended the steps."""
        self._bar.stop()
