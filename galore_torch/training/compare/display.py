"""The live display of a comparison: which run is at work, how far it and all are, and when they will be done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from galore_torch.training.compare.plan import PlannedRun
from galore_torch.training.run import records
from galore_torch.training.run.records import Record
from galore_torch.training.run.units import duration


def share_done(run: PlannedRun, newest: Record) -> float | None:
    """How much of a run is done, from 0 to 1, by its newest record; None where the record does not tell."""
    schedule = run.config.schedule
    if schedule.steps is not None:
        return min(1.0, float(newest["step"] / schedule.steps))
    return min(1.0, float(newest["epoch"] / schedule.epochs)) if "epoch" in newest else None


class Display:
    """Two bars, of the run at work and of all of them, in a terminal; each end as a line, anywhere.

    Attributes:
        console: where it is shown.

    Args:
        console: where.
        todo: the runs that are not finished.
        planned: how many there are with those that are.
    """

    def __init__(self, console: Console, todo: Sequence[PlannedRun], planned: int) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(), console=console, expand=True, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._todo, self._ended = len(todo), 0
        self._done, self._planned = planned - len(todo), planned
        self._all = self._bar.add_task("all runs", total=max(1, self._todo), told=f"{self._done}/{planned}")
        self._one = self._bar.add_task("starting", total=None, told="")
        self._run: PlannedRun | None = None
        self._metrics = Path()
        self._share = 0.0
        self._started = time.monotonic()

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begins(self, run: PlannedRun, metrics: Path) -> None:
        """Turn to the next run."""
        self._run, self._metrics, self._share = run, metrics, 0.0
        self._bar.reset(self._one, description=run.label, total=None, told="starting")
        self.look()

    def look(self) -> None:
        """See how far the run is."""
        newest = records.last(self._metrics)
        if newest is None or self._run is None:
            return
        share = share_done(self._run, newest)
        if share is not None:  # an evaluation may not tell; what the step before it told still holds
            self._share = share
            self._bar.update(self._one, total=1.0, completed=share)
        self._bar.update(self._one, told=f"step {newest['step']:,}")
        self._bar.update(self._all, completed=self._ended + self._share)

    def ended(self, run: PlannedRun, how: str) -> None:
        """Say how a run ended."""
        self._ended += 1
        self._done += 1
        self._share = 0.0
        self._bar.update(self._one, total=1.0, completed=1.0)
        self._bar.update(self._all, completed=self._ended, told=f"{self._done}/{self._planned}")
        pace = (time.monotonic() - self._started) / self._ended
        left = f", {duration(pace * (self._todo - self._ended))} left" if self._ended < self._todo else ""
        line = f"{self._done}/{self._planned} {run.label}: {how}{left}"
        self.console.print(line, soft_wrap=True, highlight=False, markup=False)
