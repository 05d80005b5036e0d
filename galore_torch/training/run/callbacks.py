"""What watches, shows and steers a Trainer: it records, completes checkpoints, and stops when a signal asks for it."""

# ruff: noqa: ARG002 - a callback takes whatever the Trainer hands to every callback

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging as transformers_logging

from galore_torch.optim import state_bytes
from galore_torch.optim.subspaces import Subspace
from galore_torch.training.run import records
from galore_torch.training.run.files import sync
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.job import Job
from galore_torch.training.run.processes import any_process, wait_for_all
from galore_torch.training.run.records import Record
from galore_torch.training.run.signals import handle, heard, stop_if_asked
from galore_torch.units import duration, readable


class Recorder(TrainerCallback):
    """Records every step, evaluation and renewal of a basis, and makes whole checkpoints of what the Trainer saves.

    Attributes:
        unit: what is counted: tokens or examples.
        seconds: time spent in training steps so far, over all resumptions; evaluations and saves do not count.
        step: the newest record of a step.
        evaluation: the newest record of an evaluation.
    """

    def __init__(self, folder: RunFolder, job: Job) -> None:
        self._folder, self._job, self.unit = folder, job, job.unit
        self.step: Record = {}
        self.evaluation: Record = {}
        self.seconds = 0.0
        self._since = 0.0
        self._saved: Path | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take up the records where the checkpoint ends."""
        for path in (self._folder.metrics, self._folder.subspaces):
            if path.exists():
                records.keep_until(path, state.global_step)
        kept = records.read(self._folder.metrics)
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        self.evaluation = next((record for record in reversed(kept) if "eval_loss" in record), {})
        self._saved = self._folder.checkpoints.root / f"checkpoint-{state.global_step}" if state.global_step else None
        self._since = time.perf_counter()

    @property
    def scores(self) -> Record:
        """What the newest evaluation came to, beside its loss."""
        of_all = {"step", self.unit, "eval_loss", "seconds"}
        return {name: value for name, value in self.evaluation.items() if name not in of_all}

    def go_back_to(self, step: int | None) -> bool:
        """Let the evaluation after a step count as the newest; False if its record is lost."""
        found = (one for one in records.read(self._folder.metrics) if one["step"] == step and "eval_loss" in one)
        self.evaluation = next(found, {})
        return bool(self.evaluation)

    def record_renewal(self, step: int, weight: str, subspace: Subspace) -> None:
        """Record the renewal of a weight's basis in a step: for `GaLoreCallback`."""
        records.append(self._folder.subspaces, {"step": step, "weight": weight, **dataclasses.asdict(subspace)})

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record a step."""
        logs = kwargs.get("logs") or {}
        if "loss" not in logs:
            return
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self.seconds += seconds
        self.step = {
            "step": state.global_step,
            # Of a run whose length is told in epochs, so that a reader knows how far it is.
            **({"epoch": state.epoch} if args.max_steps <= 0 else {}),
            **self._seen(state),
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            f"{self.unit}_per_second": self._job.units_per_step / seconds,
            "seconds": self.seconds,
        }
        records.append(self._folder.metrics, self.step)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record an evaluation."""
        measured = kwargs["metrics"]
        of_all = {"step": state.global_step, **self._seen(state), "eval_loss": measured["eval_loss"]}
        self.evaluation = {**of_all, **self._job.scores(measured), "seconds": self.seconds}
        records.append(self._folder.metrics, self.evaluation)
        self._since = time.perf_counter()

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Complete the checkpoint, which the records must not be behind after a loss of power."""
        wait_for_all()  # each process leaves its random numbers there
        for path in (self._folder.metrics, self._folder.subspaces):
            if path.exists():
                sync(path)
        step, stream = state.global_step, self._job.stream
        digest = None if stream is None else stream.digest(step)
        self._saved = self._folder.checkpoints.complete(step, before=self._saved, stream=digest)
        self._since = time.perf_counter()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave nothing but checkpoints."""
        wait_for_all()  # each Trainer looks once more into its folder
        self._folder.checkpoints.clear()

    def _seen(self, state: TrainerState) -> Record:
        return {self.unit: state.global_step * self._job.units_per_step}


class SaveOnSignal(TrainerCallback):
    """Turns the first signal into a save and a stop at the end of the step; a second one acts as it always does."""

    def __init__(self) -> None:
        self._asked = False
        self._give_back: Callable[[], None] = lambda: None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Hear the signals."""
        self._give_back = handle(self._ask)
        stop_if_asked()

    def _ask(self, number: int, _frame: Any) -> None:
        self._asked = True
        heard(number)
        self._give_back()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop once any process was asked to."""
        if any_process(self._asked, args.device):
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Hear no more."""
        self._give_back()


class EarlyStopping(EarlyStoppingCallback):
    """Transformers' own, which counts on where a checkpoint has it, and knows that it has ended a training."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take up the count."""
        kept: Any = state.stateful_callbacks  # by name, which Transformers declares otherwise
        saved = kept.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]

    @property
    def has_ended(self) -> bool:
        """Whether so many evaluations in a row were no better than the best."""
        return bool(self.early_stopping_patience_counter >= self.early_stopping_patience)


class NoStepLeftError(Exception):
    """Every step had been made when the Trainer was about to begin."""


class EndAfterLastStep(TrainerCallback):
    """Stops a Trainer that was resumed after its last step, which would make one more before it looks at the end.

    Args:
        early: may have ended the training before; None if nothing does.
    """

    def __init__(self, early: EarlyStopping | None) -> None:
        self._early = early

    def has_come(self, state: TrainerState) -> bool:
        """Whether all steps are made that are to be made."""
        return state.global_step >= state.max_steps or (self._early is not None and self._early.has_ended)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raise if no step is left: model, optimizer and records are as the checkpoint has them by now."""
        if self.has_come(state):
            raise NoStepLeftError


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


class StepProgress(TrainerCallback):
    """Shows the steps of a Trainer with loss, learning rate, pace, optimizer state and the time that is left.

    Args:
        console: where.
        recorder: of the run, whose evaluations are lines too; if None, only the loss is shown.
        steps: how many there will be, if fewer than the Trainer expects.
        every: steps of which one takes longer, so that only as many together tell what is to come.
    """

    def __init__(
        self, console: Console, recorder: Recorder | None = None, steps: int | None = None, every: int = 1
    ) -> None:
        self._console, self._recorder, self._steps, self._every = console, recorder, steps, every
        columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=console, expand=True, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("starting")
        self._first: tuple[int, float] | None = None  # a step and when it ended: the first, which makes much once
        self._end: float | None = None  # when the last one will have ended

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
        total = self._steps or state.max_steps
        text += self._left(step, total)
        self._bar.update(self._task, completed=step, description=text)
        if not self._console.is_terminal and (step == 1 or step % max(1, total // PLAIN_LINES) == 0):
            self._console.print(f"step {step}/{total}  {text}", soft_wrap=True)

    def _left(self, step: int, total: int) -> str:
        """The time that the steps after one will take, by those until now; nothing where that cannot be told yet."""
        now = self._bar.get_time()
        first, begun = self._first = self._first or (step, now)
        if step > first and step % self._every == 0:
            self._end = now + (now - begun) / (step - first) * (total - step)
        end = now if step >= total else self._end
        return "" if end is None else f"  {duration(max(0, end - now))} left"

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
