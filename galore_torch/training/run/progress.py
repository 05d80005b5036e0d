"""The live display of a run: one line with a bar in a terminal, plain lines elsewhere."""

# ruff: noqa: ARG002 - a callback takes whatever the Trainer hands to every callback

from __future__ import annotations

from typing import Any

import datasets
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from galore_torch.optim import state_bytes
from galore_torch.training.run.metrics import MetricsLog
from galore_torch.training.run.units import duration, megabytes

PLAIN_LINES = 20
"""How many lines show a run where there is no terminal."""

_UNITS = {"tokens": "tok/s", "examples": "examples/s"}


def quiet(console: Console) -> None:
    """Leave the screen to our own display; Datasets' bars stay in a terminal, for large data."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.logging.set_verbosity_error()
    if not console.is_terminal or console.quiet:
        datasets.disable_progress_bars()


def step_bar(console: Console) -> Progress:
    """A bar of steps with the time that is left, gone when it stops.

    Args:
        console: where it is drawn.
    """
    return Progress(
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        expand=True,
        transient=True,
    )


class LiveProgress(TrainerCallback):
    """Shows step, loss, learning rate, tokens/s, optimizer state and the estimated end; evaluations as lines."""

    def __init__(self, console: Console, log: MetricsLog) -> None:
        self._console = console
        self._log = log
        self._first = (0, 0.0)  # the first step shown, and the time by then
        self._bar = step_bar(console)
        self._task = self._bar.add_task("starting")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw the bar."""
        self._first = (0, 0.0)
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
        if self._console.is_terminal and state.is_world_process_zero:
            self._bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show a step."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        now = self._log.last
        self._first = self._first if self._first[0] else (state.global_step, self._log.seconds)
        unit = self._log.unit
        pace = f"{now[f'{unit}_per_second']:,.0f} {_UNITS[unit]}"
        text = (
            f"loss {now['loss']:.3f}  lr {now['lr']:.1e}  {pace}  state {megabytes(state_bytes(kwargs['optimizer']))}"
        )
        if self._console.is_terminal:
            self._bar.update(self._task, completed=state.global_step, description=text)
        elif state.global_step % max(1, state.max_steps // PLAIN_LINES) == 0 or state.global_step == 1:
            self._console.print(
                f"step {state.global_step}/{state.max_steps}  {text}{self._left(state)}", soft_wrap=True
            )

    def _left(self, state: TrainerState) -> str:
        """The estimated time to the end, by the pace since the first step, which is slower than the others."""
        step, seconds = self._first
        if state.global_step == step:
            return ""
        pace = (self._log.seconds - seconds) / (state.global_step - step)
        return f"  {duration(pace * (state.max_steps - state.global_step))} left"

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Print an evaluation."""
        if state.is_world_process_zero:
            scores = ", ".join(f"{name} {_short(value)}" for name, value in self._log.scores.items())
            judged = "text" if self._log.unit == "tokens" else "rows"
            self._console.print(f"step {state.global_step}/{state.max_steps}  {scores} on held-out {judged}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the bar away."""
        self._bar.stop()


def _short(score: float) -> str:
    return f"{score:,.2f}" if score >= 10 else f"{score:.4f}"
