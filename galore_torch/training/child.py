"""A command of ours in a process of its own, whose memory and whose end are its alone."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

import galore_torch
from galore_torch.training.guard import handled_by, heard

# Not by -m, which imports from the working directory first: a datasets.py that lies there would be run. What -c puts
# there is taken away before anything is imported; where the package is comes last, behind all that it needs itself.
_HOME = Path(galore_torch.__file__).parents[1]
_START = """import sys
sys.path = [place for place in sys.path if place] + [sys.argv.pop(1)]
from galore_torch.cli import main
main()"""

_LOOK_EVERY = 0.25  # seconds


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        status: its exit status.
        output: what it wrote to stdout; empty if that went to a log.
        stopped: whether we were asked to stop while it ran.
    """

    status: int
    output: str
    stopped: bool


def run_child(
    arguments: Sequence[str],
    *,
    log: Path | None = None,
    kept_open: Sequence[int] = (),
    watch: Callable[[], None] | None = None,
) -> Ended:
    """Run ``galore ARGUMENTS`` and wait for it.

    The child hears no Ctrl-C of the terminal: each signal to us is passed on to it, so that it comes once, and the
    child saves and ends.

    Args:
        arguments: of the command, such as ``("pretrain", "--json")``.
        log: where all that it prints goes, from the start of the file; if None, stderr is ours and stdout is returned.
        kept_open: file descriptors that it inherits.
        watch: called a few times a second meanwhile.

    Returns:
        Its status, its output and whether it was asked to stop.
    """
    command = [sys.executable, "-c", _START, str(_HOME), *arguments]
    asked: list[int] = []
    process: subprocess.Popen[str] | None = None

    def pass_on(number: int, _frame: FrameType | None) -> None:
        heard(number)
        asked.append(signal.SIGINT)
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT)

    with handled_by(pass_on):
        file: IO[str] | None = None if log is None else log.open("w", encoding="utf-8")
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file or subprocess.PIPE,
                stderr=subprocess.STDOUT if file else None,
                text=True,
                start_new_session=True,
                pass_fds=kept_open,
            )
        finally:
            if file is not None:
                file.close()
        if asked:  # while it was being started
            process.send_signal(signal.SIGINT)
        output = _wait(process, watch)
    return Ended(process.returncode, output, bool(asked))


def _wait(process: subprocess.Popen[str], watch: Callable[[], None] | None) -> str:
    while True:
        try:
            output, _ = process.communicate(timeout=_LOOK_EVERY)
        except subprocess.TimeoutExpired:  # noqa: PERF203
            if watch is not None:
                watch()
        else:
            return output or ""
