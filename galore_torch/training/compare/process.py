"""A function called in a process of its own, whose memory is its alone; what it returns or raises comes back."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import typer
from rich.console import Console

from galore_torch.interrupts import SIGNALS
from galore_torch.training.run.command import show_warnings
from galore_torch.training.run.processes import is_first
from galore_torch.training.run.signals import Stop, handled_by, heard, stoppable

_SPAWN = multiprocessing.get_context("spawn")
_POSIX = os.name == "posix"  # elsewhere a Ctrl-C reaches every process of the console

T = TypeVar("T")


class ProcessDiedError(RuntimeError):
    """The process was gone before its function returned: killed, out of memory, or crashed in native code."""


def call_in_process(function: Callable[..., T], *args: Any, log: Path, console: Console) -> T:
    """Call a function in a new process, and wait for it.

    The process hears no Ctrl-C of the terminal: each signal to this one is passed on, so that it comes once, and the
    function ends as a command does. So it does when this process is killed.

    Args:
        function: of a module. Its last argument is a console that shows on our terminal; without one, in the log.
        args: those before it, which can be pickled.
        log: where stdout and stderr of the process go, from the start of the file, which processes of a job share.
        console: ours.

    Raises:
        Stop: when this process was asked to stop meanwhile; the function has ended too.
        ProcessDiedError: when the process ended otherwise than by return or exception.
        BaseException: what the function raised.
    """
    receiver, sender = _SPAWN.Pipe(duplex=False)
    terminal = (2 if console.stderr else 1) if console.is_terminal and not console.quiet else None
    process = _SPAWN.Process(target=_serve, args=(sender, function, args, log, terminal, console.width))
    asked: list[int] = []

    def interrupt(number: int, _frame: FrameType | None = None) -> None:
        heard(number)
        asked.append(number)
        if _POSIX and process.is_alive():
            os.kill(process.pid or 0, signal.SIGINT)

    log.parent.mkdir(parents=True, exist_ok=True)
    if is_first():
        log.unlink(missing_ok=True)
    with handled_by(interrupt):
        with _quiet_start():
            process.start()
        sender.close()
        try:
            result, error = receiver.recv()
        except EOFError:
            process.join()
            result, error = None, ProcessDiedError(_end(process.exitcode, log))
        except BaseException:
            interrupt(signal.SIGINT)
            raise
        finally:
            process.join()
            console.show_cursor()  # which a killed process may have hidden
    if asked or error is not None:
        raise Stop if asked else error
    returned: T = result
    return returned


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Start a process that no signal ends before it listens, and that imports nothing from the working directory."""
    resource_tracker.ensure_running()  # whose own start would let the signals in
    imports = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    if _POSIX:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        if _POSIX:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.environ["PYTHONSAFEPATH"] = imports or ""  # empty is as unset


def _end(code: int | None, log: Path) -> str:
    """How a process ended, and the last that it wrote."""
    end = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with status {code}"
    last = log.read_text(encoding="utf-8", errors="replace").split("\n")[-2:-1] if log.exists() else []
    return ": ".join([f"the process {end}", *filter(None, last)])


def _serve(
    sender: Connection, function: Callable[..., Any], args: tuple[Any, ...], log: Path, terminal: int | None, width: int
) -> None:
    """Be the process: call the function, and send what it returned or raised."""
    screen = None if terminal is None else os.fdopen(os.dup(terminal), "w", encoding="utf-8")
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(output, stream)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    answer: tuple[Any, BaseException | None]
    try:
        with stoppable(lambda: "Stopped."):
            if _POSIX:
                os.setsid()
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            shown = Console(file=screen, width=width if screen else None)
            show_warnings(shown)
            answer = function(*args, shown), None
    except typer.Exit:
        answer = None, Stop()
    except BaseException as error:
        traceback.print_exc()
        answer = None, _portable(error)
    sender.send(answer)


def _portable(error: BaseException) -> BaseException:
    """An exception that survives the way to the other process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGINT)  # which also ends a wait of the main thread
