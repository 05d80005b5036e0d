"""What all commands share: how options are declared, libraries loaded, errors and warnings told."""

from __future__ import annotations

import gc
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from galore_torch.training.run import processes
from galore_torch.training.run.disk import failed_write
from galore_torch.training.run.folder import OtherDataError
from galore_torch.training.run.names import NotPushedError

REFUSED = 2  # the exit status of a command that was asked for something it cannot do, as shells have it
FAILED = 1  # that of one that could not finish what it had begun


def option(help: str, *names: str, panel: str = "Run", metavar: str | None = None) -> Any:
    """An option of a command itself, under a heading of ``--help``; names only where they are not the parameter's."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel)


Json = Annotated[bool, option("Print the result as one JSON object; progress goes to stderr.", "--json")]

_PYTHONS_OWN = ("warnings", "_py_warnings")  # the module in which Python's functions for warnings are, by its version
_ROOM = "Free some space there, or allow writing; --out, --cache and TMPDIR choose other places."


def table_of(columns: Iterable[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table for a terminal of 80 columns: names to the left, figures to the right."""
    made = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for place, heading in enumerate(columns):
        made.add_column(heading, justify="right" if place else "left", overflow="fold", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def this_command() -> str:
    """The command that runs, as it was given, for reports."""
    return shlex.join(["galore", *sys.argv[1:]])


@contextmanager
def reported_errors(command: str, left: Callable[[], str] | None = None) -> Iterator[None]:
    """Print an error of a command's body that `explain` explains as a line on stderr, without a traceback.

    Args:
        command: whose it is, such as ``galore pretrain``.
        left: of a body at work: says what is left, and how to go on.

    Raises:
        typer.Exit: with `FAILED` where a body at work could not write; with `REFUSED` for what was asked for.
    """
    try:
        yield
    except Exception as error:
        text = explain(error, at_work=left is not None)
        if text is None:
            raise
        text += "" if left is None else f" {left()}"
        Console(stderr=True).print(f"[bold red]{command}:[/] {escape(text)}", highlight=False, soft_wrap=True)
        raise typer.Exit(REFUSED if left is None else FAILED) from error


def explain(error: Exception, *, at_work: bool = False) -> str | None:
    """What an error says that a user can do something about; None for any other error.

    Of a command that was at work, all that was asked for had been found right: only its failed writes are the user's,
    a stream that tells late what it is, and what the Hub does not take.
    """
    failed = failed_write(error)
    file = error if isinstance(error, OSError) and error.filename is not None else None
    if failed is None and file is not None and at_work:
        failed = f"{file.strerror}: {file.filename}"
    if failed is not None:
        return f"a file could not be written: {failed}. {_ROOM}"
    if isinstance(error, (OtherDataError, NotPushedError) if at_work else (ValueError, ImportError)):
        return " ".join(map(str.strip, str(error).splitlines()))
    if not at_work and file is not None:
        return f"{file.filename!r} cannot be used: {file.strerror}. Allow it, or give another path."
    return None


def show_warnings(console: Console) -> None:
    """Print this package's warnings as a command's other lines from now on, by the first of several processes alone.

    By itself Python adds where in the program a warning arose, which here is a line of another library. Those that
    other libraries give are shown as before.
    """
    as_before = warnings.showwarning

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_globals["__name__"] in _PYTHONS_OWN:
            frame = frame.f_back  # to who has called `warnings.warn`
        if frame is None or not frame.f_globals["__name__"].startswith("galore_torch."):
            as_before(message, *where, **more)
        elif processes.is_first():
            text = f"[bold yellow]warning:[/] {escape(str(message))}"
            console.print(text, highlight=False, soft_wrap=not console.is_terminal)

    warnings.showwarning = show


class Command(TyperCommand):
    """A command that tells options given twice, and of a word too many which options it may have been meant for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read what was typed; what no option takes is an error."""
        ctx.allow_extra_args = True
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for one in dict.fromkeys(order):
            if order.count(one) > 1 and not getattr(one, "multiple", True) and processes.is_first():
                typer.echo(f"{one.opts[0]} is given twice; the last one holds.", err=True)
        rest: list[str] = super().parse_args(ctx, args)
        if ctx.args:
            options = {name for one in self.params for name in one.opts}
            named = [f"{name} {ctx.args[0]}" for name in ("--run", "--data", "--model") if name in options]
            meant = f"give {' or '.join(named)}, or " if named else ""
            ctx.fail(f"{ctx.args[0]!r} follows no option, or one that has its value; {meant}leave it out.")
        return rest


@contextmanager
def loading(console: Console) -> Iterator[None]:
    """Import what a command runs, and say so on the screen, for it takes seconds.

    Nothing of it is garbage, and to look for some in a million new objects took a fifth of the command's start: none is
    looked for meanwhile, nor ever after in what was imported.
    """
    with console.status("Loading Transformers"):
        gc.disable()
        try:
            yield
        finally:
            gc.enable()
        gc.collect()
        gc.freeze()
