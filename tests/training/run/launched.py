"""`galore` as torchrun starts it, with a process that is lost.

    launched.py SAID LOSES ARGUMENTS

runs `galore ARGUMENTS` and writes to the file SAID. LOSES = "RANK:STEP" kills that process after that step, in the
first start; after step 0 it is while the run is made ready, when the first process has begun its folder. LOSES =
"SEED*COUNT" kills a process in each of the first starts: which one, after which step and how long after it is drawn.
LOSES = "node:PID:STEP" kills after that step with the agent that has started it; after step -1 it is before all meet.
"others" has a process that is alone wait after step 6 for others to join, "waits:SECONDS" has those that meet wait no
longer, "fills:STEP" fills the disk of the run's folder after that step. LOSES = "none" kills none. Of a comparison it
is the processes of its runs.
"""

# ruff: noqa: E402 (no garbage is looked for while all is imported)
import contextlib
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

gc.disable()

from galore_torch.cli import main
from galore_torch.training.compare import process, runs
from galore_torch.training.run import processes
from galore_torch.training.run.callbacks import Recorder
from tests.forked import CONTEXT, begin
from tests.training import unplanned  # noqa: F401 (as the server has it from which all others are forked)

gc.freeze()
gc.enable()

LAST = 8  # step of the runs


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_step(step: int, lose: Callable[[float], None]) -> None:
    """Call `lose` with the seconds that a step takes, once this step is recorded or, in a resumed run, a later one."""
    on_log, before = Recorder.on_log, time.perf_counter()

    def recorded(self: Recorder, args: Any, state: Any, control: Any, **given: Any) -> None:
        nonlocal before
        on_log(self, args, state, control, **given)
        seconds, before = time.perf_counter() - before, time.perf_counter()
        if state.global_step >= step:
            lose(seconds)

    Recorder.on_log = recorded


def at_step(step: int, lose: Callable[..., Any]) -> None:
    """Call `lose` after a step, or before the first: 0 while the run is made ready, -1 before the processes meet."""
    if step > 0:
        after_step(step, lose)
    else:
        setattr(processes, "connect" if step else "require_same_text", lose)


def lose_at_the_end(is_lost: bool) -> None:
    """Lose this process once the first one has ended the run."""
    if is_lost:
        waits = processes.wait_for_all
        processes.wait_for_all = lambda: (waits(), kill())


def wait_after_step_6(waits: bool) -> None:
    """Let this process obey a signal after its next step."""
    if waits:
        once = iter([signal.pause])
        after_step(6, lambda _: [wait() for wait in once])


def lose(given: str, rank: int, world: int, start: int) -> None:
    if given == "none":
        return
    if given.startswith("node:"):
        agent, step = map(int, given.removeprefix("node:").split(":"))
        at_step(step, lambda *_: (os.kill(agent, signal.SIGKILL), kill()))
        return
    if given.startswith("waits:"):
        processes.MEETING = int(given.removeprefix("waits:"))
        return
    if given.startswith("fills:"):
        after_step(int(given.removeprefix("fills:")), lambda _: fill(Path(sys.argv[sys.argv.index("--out") + 1])))
        return
    if given == "ended":
        lose_at_the_end(rank == world - 1 and start == 0)
        return
    if given == "others":
        wait_after_step_6(world == 1)
        return
    if "*" not in given:
        lost, step = map(int, given.split(":"))
        if (lost, start) == (rank, 0):
            at_step(step, lambda *_: kill())
        return
    seed, count = map(int, given.split("*"))
    draws = random.Random(f"{seed} {start}")
    lost, step, moment = draws.randrange(world), draws.randrange(1, LAST), draws.random()
    if start < count and rank == lost:
        after_step(step, lambda seconds: threading.Timer(moment * seconds, kill).start())


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "filler").open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


class ToTrain:
    """What a process of a comparison's run calls; a forked one has the environment of its server otherwise."""

    def __init__(self, loses: str) -> None:
        self.loses = loses

    def __reduce__(self) -> Any:
        return to_train, (self.loses, dict(os.environ))


def to_train(loses: str, environment: dict[str, str]) -> Any:
    os.environ.update(environment)
    lose(loses, *numbers())
    return runs._train


def numbers() -> tuple[int, ...]:
    return tuple(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))


if __name__ == "__main__":
    said, loses = sys.argv.pop(1), sys.argv.pop(1)
    begin([Path(said), Path(said)])
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if sys.argv[1] == "compare":
        process._SPAWN, runs._train = CONTEXT, ToTrain(loses)
    else:
        lose(loses, *numbers())
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise  # a function that torchrun calls, as it does here, has to return
