"""`galore` as torchrun starts it, with a process that is lost.

LOSES = "RANK:STEP" kills that process after that step, in the first start. LOSES = "SEED*COUNT" kills a process in each
of the first starts: which one, after which step and how long after it is drawn.
"""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from galore_torch.cli import main
from galore_torch.training.run.callbacks import Recorder

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


def lose(given: str, rank: int, world: int, start: int) -> None:
    if "*" not in given:
        lost, step = map(int, given.split(":"))
        if (lost, start) == (rank, 0):
            after_step(step, lambda _: kill())
        return
    seed, count = map(int, given.split("*"))
    draws = random.Random(f"{seed} {start}")
    lost, step, moment = draws.randrange(world), draws.randrange(1, LAST), draws.random()
    if start < count and rank == lost:
        after_step(step, lambda seconds: threading.Timer(moment * seconds, kill).start())


if __name__ == "__main__":
    if os.environ.get("LOSES"):
        start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        lose(os.environ["LOSES"], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), start)
    sys.exit(main())
