"""The runs of a comparison, one after another, each in a process of its own and taken up where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from galore_torch.training.compare.display import Display
from galore_torch.training.compare.job import Job
from galore_torch.training.compare.plan import PLAN, PlannedRun, lock_of, require_same_plan, write_plan
from galore_torch.training.compare.process import Ended, run_child
from galore_torch.training.compare.score import shown
from galore_torch.training.run import records
from galore_torch.training.run.command import REFUSED
from galore_torch.training.run.files import take_back, write_whole
from galore_torch.training.run.folder import RunFolder


class FirstRefusedError(ValueError):
    """The data, or the very first run, was refused for what was asked: so would others be."""


@contextmanager
def alone_in(out: Path, console: Console) -> Iterator[None]:
    """Hold a comparison's folder for one process, and wait for whoever holds it.

    Args:
        out: the comparison's folder; if nothing is in it afterwards, and it was not there before, it goes again.
        console: where it is said who is waited for.
    """
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    lock = lock_of(out)
    lock.acquire(waiting=_waiting(console, out))
    try:
        yield
    finally:
        unused = set(out.iterdir()) <= set(lock.files)
        lock.release(remove=unused)
        take_back([], [out] if unused and made else [])


def _waiting(console: Console, folder: Path) -> Callable[[str], None]:
    return lambda holder: console.print(
        f"{folder} is in use by {holder}; waiting for its end.", soft_wrap=True, highlight=False, markup=False
    )


def error_file(folder: Path) -> Path:
    """Where a failed run's reason is kept, beside its folder."""
    return _beside(folder, "error")


def make_runs(job: Job, runs: Sequence[PlannedRun], out: Path, console: Console, command: str) -> bool:
    """Make all runs that are not finished yet.

    Args:
        job: what they are of.
        runs: the plan.
        out: the comparison's folder.
        console: where progress is shown.
        command: by which the comparison is begun, for its plan.

    Returns:
        Whether it came to the end; False when it was asked to stop. A run that failed does not stop it.

    Raises:
        ValueError: when the folder is another comparison's by now.
        FirstRefusedError: when the data, or the very first run, is refused. The folder is then as it was.
    """
    with alone_in(out, console):
        require_same_plan(out / PLAN, job, runs)
        began = write_plan(out / PLAN, job, runs, command)
        try:
            return _make_all(job, runs, out, console)
        except FirstRefusedError:
            if began:
                take_back([out / PLAN])
            raise


def _make_all(job: Job, runs: Sequence[PlannedRun], out: Path, console: Console) -> bool:
    finals = [records.final(RunFolder(out / run.folder).metrics) for run in runs]
    todo = [run for run, final in zip(runs, finals, strict=True) if final is None]
    if todo and job.prepares and not _prepare(job, todo[0], out, console):
        return False
    begun = any((out / run.folder).parent.exists() for run in runs)
    with Display(console, todo, len(runs)) as display:
        for run in todo:
            if _make_run(job, run, out, display, first=not begun).stopped:
                return False
            begun = True
    return True


def _beside(folder: Path, kind: str) -> Path:
    """A file on a run, beside its folder."""
    return folder.with_name(f"{folder.name}.{kind}")


def _prepare(job: Job, run: PlannedRun, out: Path, console: Console) -> bool:
    """Read the data in a process of its own, so that the work counts for no run's memory; True to go on."""
    console.print("Preparing the text")
    settings, log = out / "prepare.toml", out / "prepare.log"
    write_whole(settings, run.config.to_toml())
    ended = run_child([job.subcommand, "--prepare", "--config", str(settings)], log=log)
    if ended.status == REFUSED and not ended.stopped:
        reason = _reason(job, log, ended)
        take_back([settings, log])
        raise FirstRefusedError(reason)
    return not ended.stopped


def _make_run(job: Job, run: PlannedRun, out: Path, display: Display, *, first: bool) -> Ended:
    folder = RunFolder(out / run.folder)
    # Its child ends when a comparison is killed, and needs a moment for that.
    folder.wait_until_free(_waiting(display.console, folder.root))
    settings, log = _beside(folder.root, "toml"), _beside(folder.root, "log")
    if folder.config.exists():
        arguments = ["--resume"]
    else:
        write_whole(settings, run.config.to_toml())
        arguments = ["--config", str(settings)]
    error_file(folder.root).unlink(missing_ok=True)
    display.begins(run, folder.metrics)
    ended = run_child([job.subcommand, "--json", "--out", str(folder.root), *arguments], log=log, watch=display.look)
    final = records.final(folder.metrics)
    if final is None and not ended.stopped:
        reason = _reason(job, log, ended)
        if first and ended.status == REFUSED:
            made = [folder.root.parent, folder.root.parent.parent]
            take_back([settings, log, out / "prepare.toml", out / "prepare.log"], made)
            raise FirstRefusedError(reason)
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
