"""A command of ours in a process of its own, whose memory is its alone.

It stops in order, as at Ctrl-C, when the process that started it is gone: it watches its stdin, a pipe whose other end
nobody else has.
"""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import galore_torch
from galore_torch.training.run.signals import handled_by, heard

_CHILD = "GALORE_CHILD"
"""The environment variable that tells a process that it is one."""

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
    watch: Callable[[], None] | None = None,
) -> Ended:
    """Run ``galore ARGUMENTS`` and wait for it.

    The child hears no Ctrl-C of the terminal: each signal to us is passed on to it, so that it comes once, and the
    child saves and ends. So it does when we are killed.

    Args:
        arguments: of the command, such as ``("pretrain", "--json")``.
        log: where all that it prints goes, from the start of the file; if None, stderr is ours and stdout is returned.
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
        try:
            with _lifeline() as stdin, nullcontext() if log is None else log.open("w", encoding="utf-8") as file:
                process = subprocess.Popen(
                    command,
                    env={**os.environ, _CHILD: "1"},
                    stdin=stdin,
                    stdout=file or subprocess.PIPE,
                    stderr=subprocess.STDOUT if file else None,
                    text=True,
                    start_new_session=True,
                )
                if asked:  # while it was being started
                    process.send_signal(signal.SIGINT)
                output = _wait(process, watch)
        finally:
            if process is not None:  # it stops, if an error took us here
                process.wait()
    return Ended(process.returncode, output, bool(asked))


@contextmanager
def _lifeline() -> Iterator[int]:
    """A pipe's end to read from, whose other end is ours alone and closes when we leave, or are killed."""
    theirs, ours = os.pipe()
    try:
        yield theirs
    finally:
        os.close(ours)
        os.close(theirs)


def _wait(process: subprocess.Popen[str], watch: Callable[[], None] | None) -> str:
    while True:
        try:
            output, _ = process.communicate(timeout=_LOOK_EVERY)
        except subprocess.TimeoutExpired:  # noqa: PERF203
            if watch is not None:
                watch()
        else:
            return output or ""


def stop_with_parent() -> None:
    """If `run_child` started this process, stop it when the process that called that is gone."""
    if os.environ.pop(_CHILD, None):
        threading.Thread(target=_stop_at_the_end_of_stdin, daemon=True).start()


def _stop_at_the_end_of_stdin() -> None:
    while os.read(0, 1):
        pass
    if os.name == "posix":
        os.kill(os.getpid(), signal.SIGINT)  # which also ends a wait of the main thread
    else:
        _thread.interrupt_main()
