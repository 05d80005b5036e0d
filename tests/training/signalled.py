"""The command line in a process that sends itself a signal at a moment of its own, so that no test has to time one."""

import os
import subprocess
import sys
from pathlib import Path

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
    command = [sys.executable, "-m", __name__, str(int(number)), moment, *map(str, arguments)]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=DEADLINE)


def main(number: int, moment: str) -> None:
    """Be the command line, and send this process the signal once."""
    awaited = list(MOMENTS[moment])

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if awaited and event == awaited[0][0] and awaited[0][1] in str(arguments[0]):
            awaited.pop(0)
            if not awaited:
                os.kill(os.getpid(), number)

    sys.addaudithook(watch)
    from galore_torch.cli import main as galore

    galore()


if __name__ == "__main__":
    main(int(sys.argv.pop(1)), sys.argv.pop(1))
