"""The runs of a comparison, one after another, each in a process of its own and resumed where it stopped.

In several processes, which `torchrun` has started, each run has as many: each starts one. The first has the folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from galore_torch.training.compare.plan import JOBS, PLAN, PlannedRun, keep_plan, lock_of
from galore_torch.training.compare.process import call_in_process
from galore_torch.training.compare.results import beside, final_record, shown
from galore_torch.training.run import processes
from galore_torch.training.run.command import explain
from galore_torch.training.run.files import take_back, write_whole
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.job_command import JobCommand
from galore_torch.training.run.signals import Stop
from galore_torch.units import duration

_PREPARE_LOG = "prepare.log"


def make_runs(job: JobCommand, runs: Sequence[PlannedRun], out: Path, console: Console, command: str) -> None:
    """Make all runs that are not finished yet. One that fails leaves its error beside its folder; the others are made.

    Args:
        job: what they are of.
        runs: the plan.
        out: the comparison's folder.
        console: where progress is shown.
        command: by which the comparison is begun, for its plan.

    Raises:
        Stop: when this process was asked to stop; the same call goes on.
        ValueError: when the folder is another comparison's by now, or when the data or the very first run does not
            fit what was asked for: so would the others not. The folder is then as it was.
    """
    if processes.count() > 1:
        for run in runs:
            processes.require_served(run.config)
        processes.connect(trains=False)
    with _alone_in(out, console):
        is_first = processes.is_first()
        began = is_first and keep_plan(out / PLAN, job, runs, command)
        todo = [run for run in runs if final_record(run, out) is None]
        try:
            if todo and job.prepare is not None and is_first:
                console.print("Preparing the text")
                # in a process of its own, so that the work counts for no run's memory
                call_in_process(job.prepare, todo[0].config, log=out / _PREPARE_LOG, console=console)
            _make_all(job, runs, processes.gathered(todo)[0], out, console)
        except Exception as error:
            if explain(error) and is_first:
                first = out / todo[0].folder
                take_back(
                    [out / _PREPARE_LOG, beside(first, ".log"), *([out / PLAN] if began else [])],
                    [first.parent, first.parent.parent],
                )
            raise


def _make_all(
    job: JobCommand, runs: Sequence[PlannedRun], todo: Sequence[PlannedRun], out: Path, console: Console
) -> None:
    started = time.monotonic()
    for number, run in enumerate(todo, 1):
        folder = processes.run_folder(out / run.folder)
        # Its process ends when a comparison is killed, and needs a moment for that.
        folder.wait_until_free(_waiting(console, folder.root))
        if processes.gathered(final_record(run, out) is not None)[0]:
            continue  # or had so little left that it ended by itself
        log, failed = (beside(folder.root, suffix) for suffix in (".log", ".error"))
        failed.unlink(missing_ok=True)
        if console.is_terminal:
            console.rule(f"{run.label} ({number} of {len(todo)})", align="left")
        processes.begin_part(number)
        error: Exception | None = None
        ended = ""
        try:
            scores = call_in_process(_train, job.name, run.config, folder.root, log=log, console=console)
            ended = ", ".join(f"{name} {shown(name, value)}" for name, value in scores.items())
        except Exception as caught:
            error = caught
        errors = [each for each in processes.gathered(error) if each is not None]
        if errors:
            asked = next(filter(explain, errors), None)  # for what cannot be
            if number == 1 and asked is not None and not any((out / each.folder).exists() for each in runs):
                raise asked
            reasons = [" ".join((explain(each) or f"{type(each).__name__}: {each}").split()) for each in errors]
            reason = "; ".join(dict.fromkeys(reasons))
            if processes.is_first():
                write_whole(failed, reason + "\n")
            ended = f"failed: {reason}"
        left = duration((time.monotonic() - started) / number * (len(todo) - number))
        done = len(runs) - len(todo) + number
        print_line(console, f"{done}/{len(runs)} {run.label}: {ended}{f', {left} left' if number < len(todo) else ''}")


def _train(job: str, config: Any, out: Path, console: Console) -> Mapping[str, Any]:
    from galore_torch.training.run.run import new_run, resumed_run

    kind = JOBS[job].load()
    begun = processes.gathered(RunFolder(out).config.exists())[0]
    run = resumed_run(kind, out, console=console) if begun else new_run(kind, config, out, console=console)
    result = run.train()
    if not result.finished:
        raise Stop
    return JOBS[job].scores(vars(result))


@contextmanager
def _alone_in(out: Path, console: Console) -> Iterator[None]:
    """Hold a comparison's folder, and wait for whoever holds it. If it was made here and stays empty, it goes again.

    Of several processes the first one does.
    """
    if not processes.is_first():
        yield
        return
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
    return lambda holder: print_line(console, f"{folder} is in use by {holder}; waiting for its end.")


def print_line(console: Console, line: str) -> None:
    """Print a line as it is, however long."""
    console.out(line, highlight=False)
