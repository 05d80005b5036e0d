"""Runs that torchrun starts, and what they came to."""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from torch.distributed import run

from galore_torch.training.run import records
from galore_torch.training.run.folder import RunFolder
from tests.forked import TRAINING, begin
from tests.waiting import DEADLINE

LAUNCHED = Path(__file__).with_name("launched.py")
BAR = 1e-5  # float32: other sums of the same numbers


def launch(
    folder: Path,
    *given: str,
    job: str = "pretrain",
    world: int = 2,
    restarts: int = 0,
    loses: str = "none",
    forks: bool = True,
) -> tuple[int, str]:
    """Run `galore pretrain` in so many processes that torchrun starts.

    Args:
        folder: of the run.
        *given: the command's other arguments.
        job: another command in its place.
        world: how many processes.
        restarts: how often they are started anew where one is lost.
        loses: which is, as `launched.py` says.
        forks: whether torchrun and the processes that it starts are forked, with all that they import; as a user
            starts them otherwise.

    Returns:
        The exit status, and what was printed.
    """
    said = folder.with_name(f"{folder.name}.said")
    said.unlink(missing_ok=True)
    arguments = ["--standalone", f"--nproc-per-node={world}", f"--max-restarts={restarts}"]
    command = [str(LAUNCHED), str(said), loses, job, *given, "--out", str(folder)]
    deadline = DEADLINE * (1 + restarts)  # for each start
    if forks:
        process = TRAINING.start(be_torchrun, [*arguments, "--run-path", "--start-method=forkserver", *command], said)
        process.join(deadline)
        assert process.exitcode is not None, "the deadline has passed"
        return process.exitcode, said.read_text(encoding="utf-8")
    torchrun = Path(sys.executable).with_name("torchrun")
    env = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [torchrun, *arguments, *command], env=env, capture_output=True, text=True, timeout=deadline, check=False
    )
    return done.returncode, said.read_text(encoding="utf-8") + done.stderr


def be_torchrun(arguments: list[str], said: Path) -> None:
    """Without the lines of source of all callers, which torchrun asks for at each event of a rendezvous and drops.

    They are looked for in every module that is imported: half of what torchrun takes.
    """
    begin([said, said])
    inspect.stack = functools.partial(inspect.stack, 0)
    run.main(arguments)


def losses(folder: Path) -> list[float]:
    found = records.read(RunFolder(folder).metrics)
    return [record.get("loss", record.get("eval_loss")) for record in found]


def losses_of_runs(folder: Path) -> dict[str, list[float]]:
    return {method: losses(folder / method / "lr-0.01" / "seed-0") for method in ("full", "galore")}


def ended(folder: Path, *given: str, **how: Any) -> str:
    """What a run printed that ended well."""
    status, printed = launch(folder, *given, **how)
    assert status == 0, printed
    return printed


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
