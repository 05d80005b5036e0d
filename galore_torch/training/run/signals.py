"""Ctrl-C (a cluster's SIGTERM, a closed terminal) at any moment of a command: a saved state or an untouched folder.

| moment | what a signal does |
| --- | --- |
| while a run is prepared | `stoppable` ends the command; its folder is as it was |
| while it trains | `SaveOnSignal` (in `callbacks`) ends the step and saves; a second one ends it at once |
| while the finished run is written | `deferred` lets that end first; a second one ends the command at once |

A reader of the output that goes away, as ``head`` does, is as such a signal: see `Screen`.
"""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import typer
from rich.console import Console

from galore_torch.interrupts import HANGUP, heeded, write_nowhere

NOTHING_WRITTEN = "Stopped. Nothing was written."
"""What a command says that had nothing to leave behind when a signal came."""

Handler = Callable[[int, FrameType | None], None]


class Stop(KeyboardInterrupt):
    """What a signal raises.

    A class of its own, because Python ends a process by SIGINT, whatever its exit status should be, once a bare
    KeyboardInterrupt has passed through code that `exec` compiled, as dataclasses do while a library is imported.
    """


class _Asked:
    """Whether the command that runs was asked to stop, for a library may have swallowed the exception, and by what."""

    now = False
    by: int = signal.SIGINT


def heard(number: int) -> None:
    """Remember which signal asked the command to stop, for `exit_status`; to a terminal that is gone write no more."""
    _Asked.by = number
    for stream in (1, 2) if number == HANGUP else ():
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
                write_nowhere(stream)


class Screen(Console):
    """A console whose reader may go away: that asks the command to stop, as SIGTERM does, with what it has saved."""

    def on_broken_pipe(self) -> None:
        """Write nothing any more, and do what is done now when a signal comes."""
        self.quiet = True
        write_nowhere(self.file.fileno())
        handler = signal.getsignal(signal.SIGTERM)
        if callable(handler):
            handler(getattr(signal, "SIGPIPE", signal.SIGTERM), None)


def exit_status() -> int:
    """The exit status of this command after the signal that stopped it, as shells have it: 130 after Ctrl-C, 143."""
    return 128 + _Asked.by


def was_asked() -> bool:
    """Whether a signal came to the command that runs."""
    return _Asked.now


def stop_if_asked() -> None:
    """Raise `Stop` now if a signal came and the exception that it raised was lost on the way."""
    if _Asked.now:
        raise Stop


def handle(handler: Handler | signal.Handlers) -> Callable[[], None]:
    """Let a handler hear the signals, and return what gives them back. Only in the main thread anything changes."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    before: dict[signal.Signals, Any] = {number: signal.signal(number, handler) for number in heeded()}

    def give_back() -> None:
        while before:
            signal.signal(*before.popitem())

    return give_back


@contextmanager
def handled_by(handler: Handler | signal.Handlers) -> Iterator[None]:
    """Let a handler hear the signals while the body runs."""
    give_back = handle(handler)
    try:
        yield
    finally:
        give_back()


@contextmanager
def stoppable(left: Callable[[], str] = lambda: NOTHING_WRITTEN) -> Iterator[None]:
    """Make a command's body end in order, with `exit_status`, when a signal comes.

    ``left`` puts in order what the body leaves behind, disturbed by no signal, and says what that is, for stderr.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        _Asked.now = True
        heard(number)
        raise Stop

    _Asked.now, _Asked.by = False, signal.SIGINT
    with handled_by(stop):
        try:
            yield
        except BaseException as error:
            # What a library made of the interruption is one too; an end that the body chose itself is not.
            stopped = isinstance(error, KeyboardInterrupt) or (_Asked.now and isinstance(error, Exception))
            if not stopped or isinstance(error, typer.Exit):
                raise
            with handled_by(signal.SIG_IGN):
                Screen(stderr=True).out(left(), highlight=False)
            raise typer.Exit(exit_status()) from None
        finally:
            _Asked.now = False


@contextmanager
def deferred(*, until_after: bool = False) -> Iterator[None]:
    """Let the body end before a first signal counts, which is then forgotten: all is written. A second one raises.

    If ``until_after``, whoever hears signals now hears the first one after the body, however that ends.
    """
    seen: list[int] = []

    def wait(number: int, _frame: FrameType | None) -> None:
        seen.append(number)
        if not until_after:
            heard(number)
            if len(seen) > 1:
                raise Stop

    try:
        with handled_by(wait):
            yield
    finally:
        if until_after and seen:
            signal.raise_signal(seen[0])
