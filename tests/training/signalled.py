"""The command line in a process that sends itself a signal at a moment of its own, so that no test has to time one."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.forked import galore
from tests.waiting import DEADLINE

MOMENTS = {
    "commands": [("import", "galore_torch.training.pretrain.command")],
    "libraries": [("import", "transformers.trainer")],
    "dataclass": [("import", "transformers.trainer"), ("exec", '"<string>"')],  # whose methods are compiled from text
    "folder": [("os.mkdir", "/run")],
    "step": [("open", "/run/metrics.jsonl")] * 5,
    "end": [("os.mkdir", "/run/model")],
}
"""What Python's audit events report on the way to a moment: each event's name, with a part of its first argument."""


def signalled(number: int, moment: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``galore ARGUMENTS`` and let a signal come at a moment of it."""
    if not any(event in ("import", "exec") for event, _ in MOMENTS[moment]):
        return galore(*arguments, before=partial(wait_for_moment, int(number), moment))
    command = [sys.executable, "-m", __name__, str(int(number)), moment, *map(str, arguments)]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=DEADLINE)


def wait_for_moment(number: int, moment: str) -> None:
    """Have this process send itself a signal at a moment, once."""
    awaited = list(MOMENTS[moment])

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if awaited and event == awaited[0][0] and awaited[0][1] in str(arguments[0]):
            awaited.pop(0)
            if not awaited:
                os.kill(os.getpid(), number)

    sys.addaudithook(watch)


if __name__ == "__main__":
    wait_for_moment(int(sys.argv.pop(1)), sys.argv.pop(1))
    from galore_torch.cli import main

    main()
