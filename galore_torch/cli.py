"""The console command ``galore``: its subcommands and how an error is told."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from galore_torch.interrupts import heeded, write_nowhere

if TYPE_CHECKING:
    import typer

# What these libraries say while they are imported is about features that nothing here uses.
_CHATTY = ("torchao", "bitsandbytes", "torch.utils._pytree")


def main() -> None:
    """Run the command line. Without the ``train`` extra, say which line installs it."""
    if wrong := _wrong_surroundings():
        os.write(2, f"galore: {wrong}\n".encode("ascii", "backslashreplace"))
        sys.exit(2)
    if os.environ.get("COLUMNS") == "0":  # of a terminal that has no size yet; Rich would write nothing at all
        del os.environ["COLUMNS"]
    for number in heeded():
        signal.signal(number, _stop)  # until a command has something to save
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app = build_app()
    except ImportError as missing:
        sys.exit(f"galore: {missing}")
    _show_warnings()
    try:
        try:
            app()
        finally:
            print(end="", flush=True)  # Python would do it when there is nobody left to tell
    except OSError as error:
        if error.filename is not None or error.errno not in _OF_OUTPUT:
            raise
        write_nowhere(1)
        if error.errno == errno.EPIPE:  # as head leaves it, which is no news
            sys.exit(128 + signal.SIGPIPE)
        sys.exit(f"galore: the output could not be written: {error.strerror}.")


_OF_OUTPUT = (errno.EPIPE, errno.ENOSPC, errno.EIO)
"""What a write to the terminal, a pipe or a redirected output may end in."""


def _wrong_surroundings() -> str | None:
    """What of Python's own settings no command can do with, and the remedy."""
    if sys.flags.optimize > 1:
        return "PYTHONOPTIMIZE=2 (-OO) takes away docstrings, which Transformers reads; use 1, or leave it out."
    try:
        for text in (*sys.argv[1:], str(Path.cwd())):
            text.encode()
        if dashes := [text for text in sys.argv[1:] if text.startswith(("\u2013", "\u2014"))]:
            return f"{dashes[0]!r} begins by a dash that is no hyphen, as when text is copied; write --."
    except UnicodeEncodeError as error:
        why = "is no UTF-8, as Python reads it; set PYTHONUTF8=1 or LANG=C.UTF-8, or rename what it names."
        return f"{error.object!r} {why}"
    except FileNotFoundError:
        return "the working directory is not there any more; change to another."
    return None


def _stop(number: int, _frame: object) -> None:
    with suppress(OSError):  # a terminal may be gone
        os.write(2, b"galore: stopped. Nothing was written.\n")
    os._exit(128 + number)  # what sys.exit raises, a library that is being imported may swallow


def build_app() -> typer.Typer:
    """The command line as a typer application.

    Raises:
        ImportError: when the ``train`` extra is not installed.
    """
    from galore_torch.training.compare import command as comparison
    from galore_torch.training.compare.plan import JOBS
    from galore_torch.training.evaluation import command as evaluation
    from galore_torch.training.finetune.config import RowsConfig
    from galore_torch.training.inspection import command as inspection
    from galore_torch.training.inspection.config import InspectConfig
    from galore_torch.training.planning import command as planning
    from galore_torch.training.run.command import Command
    from galore_torch.training.settings.config import sections_of
    from galore_torch.training.settings.fields import with_settings

    import typer  # isort: skip

    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    shown = typer.Option(False, "--version", is_eager=True, callback=_show_version, help="Show the version.")

    def galore(version: bool = shown) -> None:
        """Train every weight of a large language model, with low-rank optimizer state for its matrices."""

    app.callback()(galore)
    for name, job in JOBS.items():
        app.command(name, cls=Command, epilog=job.epilog)(job.command())
    for judged in (evaluation.evaluate, evaluation.predict):
        examples, hidden = evaluation.EXAMPLES.format(name=judged.__name__), evaluation.NOT_HEEDED[judged.__name__]
        app.command(cls=Command, epilog=examples)(with_settings(judged, {"data": RowsConfig}, {}, hidden=hidden))
    app.add_typer(comparison.commands(), name="compare")
    inspect = with_settings(inspection.inspect, sections_of(InspectConfig), {})
    app.command("inspect", cls=Command, epilog=inspection.EPILOG)(inspect)
    app.command("plan", cls=Command, epilog=planning.EPILOG)(planning.command())
    return app


def _show_warnings() -> None:
    from rich.console import Console

    from galore_torch.training.run.command import show_warnings

    show_warnings(Console(stderr=True))


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"galore-torch {version('galore-torch')}")
        sys.exit()
