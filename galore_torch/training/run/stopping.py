"""Ctrl-C (and a cluster's SIGTERM) at any moment of a command: a saved state or an untouched folder, and a line on it.

| moment | what a signal does |
| --- | --- |
| while a run is prepared | `stoppable` ends the command; its folder is as it was |
| while it trains | `galore_torch.training.run.interrupt` ends the step and saves; a second one ends it at once |
| while the finished run is written | `deferred` lets that end first; a second one ends the command at once |
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer
from rich.console import Console

from galore_torch.training.run import records
from galore_torch.training.run.checkpoints import step_of
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.signals import SIGNALS, handled_by

STOPPED = tuple(128 + number for number in SIGNALS)
"""Exit statuses of a command that a signal stopped, as shells have them: 130 after Ctrl-C, 143 after SIGTERM."""


class Stop(KeyboardInterrupt):
    """What a signal raises.

    A class of its own, because Python ends a process by SIGINT, whatever its exit status should be, once a bare
    KeyboardInterrupt has passed through code that `exec` compiled, as dataclasses do while a library is imported.
    """


class _Asked:
    """Whether the command that runs was asked to stop, for a library may have swallowed the exception."""

    def __init__(self) -> None:
        self.now = False
        self.by: int = signal.SIGINT

    def stop(self, number: int, _frame: FrameType | None) -> None:
        self.now = True
        heard(number)
        raise Stop


_asked = _Asked()


def heard(number: int) -> None:
    """Remember which signal asked the command to stop, for `exit_status`."""
    _asked.by = number


def exit_status() -> int:
    """The exit status of this command after the signal that stopped it: one of `STOPPED`."""
    return 128 + _asked.by


def was_asked() -> bool:
    """Whether a signal came to the command that runs."""
    return _asked.now


def stop_if_asked() -> None:
    """Stop now if a signal came and the exception that it raised was lost on the way.

    Raises:
        KeyboardInterrupt: when a signal came.
    """
    if _asked.now:
        raise Stop


@contextmanager
def stoppable(left: Callable[[], str]) -> Iterator[None]:
    """Make a command's body end in order when a signal comes.

    Args:
        left: puts in order what the body leaves behind and says what that is, in one sentence or two. No signal
            disturbs it.

    Raises:
        typer.Exit: with `exit_status`, after the sentence was printed to stderr.
    """
    _asked.now = False
    heard(signal.SIGINT)
    with handled_by(_asked.stop):
        try:
            yield
        except BaseException as error:
            # What a library made of the interruption is one too; an end that the body chose itself is not.
            stopped = isinstance(error, KeyboardInterrupt) or (_asked.now and isinstance(error, Exception))
            if not stopped or isinstance(error, typer.Exit):
                raise
            with handled_by(signal.SIG_IGN):
                Console(stderr=True).print(left(), highlight=False, soft_wrap=True, markup=False)
            raise typer.Exit(exit_status()) from None
        finally:
            _asked.now = False


@contextmanager
def deferred() -> Iterator[None]:
    """Let the body end before a first signal counts, which is then forgotten: all is written. A second one raises.

    Raises:
        KeyboardInterrupt: at the second signal.
    """
    seen: list[int] = []

    def wait(number: int, _frame: FrameType | None) -> None:
        heard(number)
        seen.append(number)
        if len(seen) > 1:
            raise Stop

    with handled_by(wait):
        yield


def left_of(folder: RunFolder, command: str) -> str:
    """What a run whose process failed has left, and how to go on.

    Args:
        folder: of the run.
        command: that trains it.
    """
    saved = folder.checkpoints.newest()
    what = "has no checkpoint yet" if saved is None else f"is saved as of step {step_of(saved):,}"
    again = "start it again with" if saved is None else "go on with"
    return f"{folder.root} {what}; then {again}:\n  {command} --resume --out {folder.root}"


class RunLeft:
    """What a stopped command leaves of the run folder it was at work in: for `stoppable`.

    Attributes:
        folder: the run folder, once it is known.
        resumed: whether the run was there before.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        self.folder: RunFolder | None = None
        self.resumed = False

    def at_work_in(self, out: Path, *, resumed: bool) -> None:
        """Say which folder the command is about to write into."""
        self.resumed = resumed
        self.folder = RunFolder(out)

    def __call__(self) -> str:
        """Leave a saved state or an untouched folder, and say which."""
        folder = self.folder
        if folder is None or not (self.resumed or folder.was_begun_here):
            return "Stopped. Nothing was written."
        folder.abandon()
        root, saved = folder.root, folder.checkpoints.newest()
        if records.final(folder.metrics) is not None:
            return f"Stopped after the end: {root} holds the finished run."
        go_on = f"{self.command} --resume --out {root}"
        if saved is not None:
            return f"Stopped. {root} is saved as of step {step_of(saved):,}; go on with:\n  {go_on}"
        if folder.config.exists():
            return f"Stopped. {root} is as it was, before its first checkpoint; start it again with:\n  {go_on}"
        left = "as it was" if root.exists() else "not there"
        return f"Stopped before there was anything to save: {root} is {left}."
