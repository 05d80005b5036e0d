"""How a command tells what is wrong with what was asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

REFUSED = 2
"""The exit status of a command that was asked for something it cannot do, as shells have it."""


@contextmanager
def told(command: str) -> Iterator[None]:
    """Tell an error of the body in a line of stderr, without a traceback: it is about what was asked for.

    Args:
        command: whose it is, such as ``galore pretrain``.

    Raises:
        typer.Exit: with `REFUSED`, for a ValueError or a missing library.
    """
    try:
        yield
    except (ValueError, ImportError) as error:
        line = f"[bold red]{command}:[/] {escape(str(error))}"
        Console(stderr=True).print(line, highlight=False, soft_wrap=True)
        raise typer.Exit(REFUSED) from error
