"""How a command tells what is wrong with what was asked of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from galore_torch.training.run.disk import failed_write

REFUSED = 2
"""The exit status of a command that was asked for something it cannot do, as shells have it."""

FAILED = 1
"""The exit status of a command that could not finish what it had begun."""

_ROOM = "Free some space there, or allow writing; --out, --cache and TMPDIR choose other places."


@contextmanager
def told(command: str) -> Iterator[None]:
    """Tell an error of the body in a line of stderr, without a traceback: it is about what was asked for.

    Args:
        command: whose it is, such as ``galore pretrain``.

    Raises:
        typer.Exit: with `REFUSED`, for a ValueError, a missing library, or a file that cannot be read or written.
    """
    try:
        yield
    except Exception as error:
        failed = failed_write(error)
        if failed is not None:
            _tell(command, f"{_sentence(failed)} {_ROOM}")
        elif isinstance(error, (ValueError, ImportError)):
            _tell(command, str(error))
        elif isinstance(error, OSError) and error.filename is not None:
            _tell(command, f"{error.filename!r} cannot be used: {error.strerror}. Allow it, or give another path.")
        else:
            raise
        raise typer.Exit(REFUSED) from error


@contextmanager
def writes_told(command: str, left: Callable[[], str]) -> Iterator[None]:
    """Tell that a write failed while the body was at work, on a full disk for example, without a traceback.

    Args:
        command: whose it is.
        left: says in a sentence or two what is left, and how to go on.

    Raises:
        typer.Exit: with `FAILED`, for such an error; others go on as they are.
    """
    try:
        yield
    except Exception as error:
        failed = failed_write(error)
        if failed is None and isinstance(error, OSError) and error.filename is not None:
            failed = f"{error.strerror}: {error.filename}"
        if failed is None:
            raise
        _tell(command, f"{_sentence(failed)} {_ROOM} {left()}")
        raise typer.Exit(FAILED) from error


def _sentence(text: str) -> str:
    return f"a file could not be written: {text}."


def _tell(command: str, text: str) -> None:
    Console(stderr=True).print(f"[bold red]{command}:[/] {escape(text)}", highlight=False, soft_wrap=True)
