"""The runs of a comparison, one after another, each in a process of its own and taken up where it stopped."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from galore_torch.training import records
from galore_torch.training.child import Ended, run_child
from galore_torch.training.compare_display import Display
from galore_torch.training.compare_job import Job
from galore_torch.training.compare_plan import PlannedRun
from galore_torch.training.compare_score import shown
from galore_torch.training.files import write_whole
from galore_torch.training.run_folder import RunFolder
from galore_torch.training.telling import REFUSED


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
            console.print(f"A run in {out} is still at work; waiting for its end.", soft_wrap=True, markup=False)
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

    Raises:
        ValueError: when the data, or the very first run, is refused for what was asked: so would others be.
    """
    with alone_in(out, console) as lock:
        finals = [records.final(RunFolder(out / run.folder).metrics) for run in runs]
        todo = [run for run, final in zip(runs, finals, strict=True) if final is None]
        if todo and job.prepares and not _prepare(job, todo[0], out, console, lock):
            return False
        begun = any((out / run.folder).parent.exists() for run in runs)
        with Display(console, todo, len(runs)) as display:
            for run in todo:
                if _make_run(job, run, out, display, lock, first=not begun).stopped:
                    return False
                begun = True
    return True


def _settings_file(run: PlannedRun, out: Path) -> Path:
    folder = out / run.folder
    path = folder.with_name(f"{folder.name}.toml")
    write_whole(path, run.config.to_toml())
    return path


def _prepare(job: Job, run: PlannedRun, out: Path, console: Console, lock: int) -> bool:
    """Read the data in a process of its own, so that the work counts for no run's memory; True to go on."""
    console.print("Preparing the text")
    settings, log = out / "prepare.toml", out / "prepare.log"
    write_whole(settings, run.config.to_toml())
    ended = run_child([job.subcommand, "--prepare", "--config", str(settings)], log=log, kept_open=(lock,))
    if ended.status == REFUSED and not ended.stopped:
        raise ValueError(_reason(job, log, ended))
    return not ended.stopped


def _make_run(job: Job, run: PlannedRun, out: Path, display: Display, lock: int, *, first: bool) -> Ended:
    folder = RunFolder(out / run.folder)
    if folder.config.exists() and folder.last_checkpoint() is not None:
        arguments = ["--resume"]
    else:  # nothing in it could be gone on from
        shutil.rmtree(folder.root, ignore_errors=True)
        arguments = ["--config", str(_settings_file(run, out))]
    error_file(folder.root).unlink(missing_ok=True)
    log = folder.root.with_name(f"{folder.root.name}.log")
    display.begins(run, folder.metrics)
    command = [job.subcommand, "--json", "--out", str(folder.root), *arguments]
    ended = run_child(command, log=log, kept_open=(lock,), watch=display.look)
    final = records.final(folder.metrics)
    if final is None and not ended.stopped:
        reason = _reason(job, log, ended)
        if first and ended.status == REFUSED:
            raise ValueError(reason)
        write_whole(error_file(folder.root), reason + "\n")
        display.ended(run, f"failed: {reason}")
    elif final is not None:
        display.ended(run, ", ".join(f"{name} {shown(name, value)}" for name, value in job.scores(final).items()))
    return ended


def _reason(job: Job, log: Path, ended: Ended) -> str:
    """Why a child failed, in a line: what its command told, or else the last that it printed."""
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    if not text:
        return f"ended with status {ended.status} and said nothing"
    _, found, told = text.rpartition(f"galore {job.subcommand}: ")
    return " ".join(told.split()) if found and ended.status == REFUSED else text.splitlines()[-1].strip()
