"""What the commands of jobs share: their options, and all from the settings to the result on the screen."""

from __future__ import annotations

import dataclasses
import gc
import json as json_format
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from galore_torch.training.run import hub, processes
from galore_torch.training.run.checkpoints import step_of
from galore_torch.training.run.disk import failed_write
from galore_torch.training.run.folder import OtherDataError, RunFolder
from galore_torch.training.run.signals import Screen, exit_status, stoppable
from galore_torch.units import duration, readable

if TYPE_CHECKING:
    from galore_torch.training.run.job import Job, RunResult

REFUSED = 2  # the exit status of a command that was asked for something it cannot do, as shells have it
FAILED = 1  # that of one that could not finish what it had begun
PANEL = "Run"  # the heading under which --help lists a command's own options


def option(help: str, *names: str, panel: str = PANEL, metavar: str | None = None) -> Any:
    """An option of a command itself, under a heading of ``--help``; names only where they are not the parameter's."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel)


Config = Annotated[Path | None, option("TOML file of settings, such as a run folder's config.toml.")]
Out = Annotated[Path | None, option("Run folder to make, by default in runs/.")]
_RESUME = "Resume the run in --out, with its own settings; with more --steps or --epochs also one that has ended."
Resume = Annotated[bool, option(_RESUME, "--resume")]
Json = Annotated[bool, option("Print the result as one JSON object; progress goes to stderr.", "--json")]

_ROOM = "Free some space there, or allow writing; --out, --cache and TMPDIR choose other places."


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
    if isinstance(error, (OtherDataError, hub.NotPushedError) if at_work else (ValueError, ImportError)):
        return " ".join(map(str.strip, str(error).splitlines()))
    if not at_work and file is not None:
        return f"{file.filename!r} cannot be used: {file.strerror}. Allow it, or give another path."
    return None


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


def run_command(
    load: Callable[[], type[Job]],
    command: str,
    configure: Callable[[], tuple[Any, str]],
    given: Mapping[str, Any],
    *,
    out: Path | None,
    resume: bool,
    json: bool,
    instead: Callable[[Any, Console], None] | None = None,
) -> None:
    """Be the command of a job, from its options to the result on the screen and the exit status.

    Args:
        load: imports the job, which takes seconds: a wrong option is reported before.
        command: the subcommand's name.
        configure: makes the settings, and names the run folder if ``out`` does not.
        given: all options that name settings, which a resumed run has of its own.
        out: the run folder.
        resume: whether to resume it.
        json: whether the result is printed as JSON.
        instead: what is done with the settings instead of a run.
    """
    console, name = Screen(stderr=json, quiet=not processes.is_first()), f"galore {command}"
    changes: dict[str, Any] = {}
    folder: RunFolder | None = None
    with stoppable(lambda: _stopped(folder, name, resumed=resume)):
        with reported_errors(name):
            if resume:
                if out is None:
                    raise ValueError("resume needs to know which run; give its folder as --out runs/NAME.")
                changes = RunFolder(out).require_unfinished(given)
                found, settings = out, None
            else:
                settings, default = configure()
                settings.require_there()
                hub.require_token(settings.schedule.push_to_hub)
                if instead is not None:
                    instead(settings, console)
                    return
                found = out or Path("runs", default)
                resume = processes.goes_on(RunFolder(found))
                if not resume:
                    processes.run_folder(found).require_new()
            folder = processes.run_folder(found)
            with loading(console):
                from galore_torch.training.run.run import new_run, resumed_run

                job = load()
            run = (
                resumed_run(job, folder, console=console, changes=changes)
                if resume
                else new_run(job, settings, folder, console=console)
            )
        with reported_errors(name, lambda: _failed(run.folder, name)):
            result: RunResult = run.train()
        if json and processes.is_first():
            print(json_format.dumps(dataclasses.asdict(result)))
        elif not json:
            for line in _shown(result, name):
                console.out(line, highlight=False)
        if not result.finished:
            raise typer.Exit(exit_status())


def _shown(result: RunResult, name: str) -> list[str]:
    """What a run came to, and what to do with it."""
    if not result.finished:
        return [
            f"Stopped after step {result.step:,}. It is saved in {result.checkpoint}; resume with:",
            f"  {name} --resume --out {shlex.quote(result.out)}",
        ]
    folder = RunFolder(Path(result.out))
    planned = result.planned_memory_bytes
    said = "" if planned is None else f" (planned {readable(planned)}; both with the process itself)"
    names = ("model", "metrics", "plot", "predictions", "events")
    files = {name: getattr(folder, name) for name in names}
    return [
        f"{result.headline}  optimizer state {readable(result.state_bytes)}  "
        f"peak memory {readable(result.peak_memory_bytes)}{said}  {duration(result.seconds)} of training",
        "  ".join(f"{what} {path}" for what, path in files.items() if path.exists()),
        *result.remarks,
    ]


def _failed(folder: RunFolder, name: str) -> str:
    """What a run whose process failed has left, and how to go on."""
    if folder.final is not None:
        return f"{folder.root} holds the finished run."
    saved, how = folder.checkpoints.newest(), f":\n  {name} --resume --out {shlex.quote(str(folder.root))}"
    if saved is not None:
        return f"{folder.root} is saved as of step {step_of(saved):,}; resume with{how}"
    return f"{folder.root} has no checkpoint yet; start it over with{how}"


def _stopped(folder: RunFolder | None, name: str, *, resumed: bool) -> str:
    """Leave a saved state or an untouched folder of the run that a stopped command was at work on, and say which."""
    if folder is None or not (resumed or folder.was_begun_here):
        return "Stopped. Nothing was written."
    folder.abandon()
    if folder.config.exists():
        return f"Stopped. {_failed(folder, name)}"
    there = "as it was" if folder.root.exists() else "not there"
    return f"Stopped before there was anything to save: {folder.root} is {there}."
