"""The runs of a comparison, one after another, each in a process of its own and taken up where it stopped."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from galore_torch.training import records
from galore_torch.training.child import Ended, run_child
from galore_torch.training.compare_plan import Job, PlannedRun
from galore_torch.training.files import write_whole
from galore_torch.training.run_folder import RunFolder
from galore_torch.training.units import duration


@contextmanager
def alone_in(out: Path, console: Console) -> Iterator[int]:
    """Hold a comparison's folder for one process and its child, and wait for whoever holds it.

    The child inherits the lock: a run that outlives a killed comparison is waited for, not run into.

    Args:
        out: the comparison's folder.
        console: where it is said who is waited for.

    Yields:
        The lock's file descriptor.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out / "compare.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"A run in {out} is still at work; waiting for its end.", soft_wrap=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def error_file(folder: Path) -> Path:
    """Where a failed run's reason is kept, beside its folder."""
    return folder.with_name(f"{folder.name}.error")


def make_runs(job: Job, runs: Sequence[PlannedRun], out: Path, console: Console) -> bool:
    """Make all runs that are not finished yet.

    Args:
        job: what they are of.
        runs: the plan.
        out: the comparison's folder.
        console: where progress is shown.

    Returns:
        Whether it came to the end; False when it was asked to stop. A run that failed does not stop it.
    """
    todo = [run for run in runs if records.final(RunFolder(out / run.folder).metrics) is None]
    with alone_in(out, console) as lock:
        todo = [run for run in todo if records.final(RunFolder(out / run.folder).metrics) is None]
        if todo and not _prepare_text(job, todo[0], out, console, lock):
            return False
        with _Live(console, todo, len(runs)) as live:
            for run in todo:
                if _make_run(job, run, out, live, lock).stopped:
                    return False
    return True


def _settings_file(run: PlannedRun, out: Path) -> Path:
    folder = out / run.folder
    path = folder.with_name(f"{folder.name}.toml")
    write_whole(path, run.config.to_toml())
    return path


def _prepare_text(job: Job, run: PlannedRun, out: Path, console: Console, lock: int) -> bool:
    """Read the text in a process of its own, so that the work counts for no run's memory; True to go on."""
    console.print("Preparing the text")
    arguments = [job.subcommand, "--prepare", "--config", str(_settings_file(run, out))]
    return not run_child(arguments, log=out / "prepare.log", kept_open=(lock,)).stopped


def _make_run(job: Job, run: PlannedRun, out: Path, live: _Live, lock: int) -> Ended:
    folder = RunFolder(out / run.folder)
    if folder.config.exists() and folder.last_checkpoint() is not None:
        arguments = ["--resume"]
    else:  # nothing in it could be gone on from
        shutil.rmtree(folder.root, ignore_errors=True)
        arguments = ["--config", str(_settings_file(run, out))]
    error_file(folder.root).unlink(missing_ok=True)
    log = folder.root.with_name(f"{folder.root.name}.log")
    live.begins(run, folder.metrics)
    command = [job.subcommand, "--json", "--out", str(folder.root), *arguments]
    ended = run_child(command, log=log, kept_open=(lock,), watch=live.look)
    final = records.final(folder.metrics)
    if final is None and not ended.stopped:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = lines[-1].strip() if lines else f"ended with status {ended.status} and said nothing"
        write_whole(error_file(folder.root), reason + "\n")
        live.ended(run, f"failed: {reason}")
    elif final is not None:
        value = final.get(job.score)
        live.ended(run, f"{job.score} {value:,.2f}" if value is not None else f"{job.score} is not finite")
    return ended


class _Live:
    """Shows which run is at work, how far it and all are, and when they will be done; each end as a line."""

    def __init__(self, console: Console, todo: Sequence[PlannedRun], planned: int) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, expand=True, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._steps = sum(run.config.schedule.steps for run in todo)
        self._all = self._bar.add_task("all steps", total=max(1, self._steps))
        self._one = self._bar.add_task("starting", total=None)
        self._done, self._planned = planned - len(todo), planned
        self._before = 0
        self._metrics: Path | None = None
        self._started = time.monotonic()

    def __enter__(self) -> _Live:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begins(self, run: PlannedRun, metrics: Path) -> None:
        """Turn to the next run."""
        self._metrics = metrics
        self._bar.reset(self._one, description=run.label, total=run.config.schedule.steps)
        self.look()

    def look(self) -> None:
        """See how far the run is."""
        newest = records.last(self._metrics) if self._metrics is not None else None
        step = newest["step"] if newest else 0
        self._bar.update(self._one, completed=step)
        self._bar.update(self._all, completed=self._before + step)

    def ended(self, run: PlannedRun, how: str) -> None:
        """Say how a run ended."""
        self._before += run.config.schedule.steps
        self._done += 1
        pace = (time.monotonic() - self._started) / self._before
        left = f", {duration(pace * (self._steps - self._before))} left" if self._before < self._steps else ""
        line = f"{self._done}/{self._planned} {run.label}: {how}{left}"
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)
