"""``galore inspect``: from flags to looks at gradients, and from their figures to screen and folder."""

from __future__ import annotations

import dataclasses
import json as json_format
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from galore_torch.training.finetune.tasks import GLUE
from galore_torch.training.inspection.config import InspectConfig, SubjectConfig, configure
from galore_torch.training.inspection.folder import require_free, write
from galore_torch.training.run.command import reported_errors
from galore_torch.training.run.signals import deferred, stoppable

if TYPE_CHECKING:
    from galore_torch.training.inspection.result import Inspection
    from galore_torch.training.inspection.subject import Subject

EPILOG = """[bold]Examples[/]

galore inspect --run runs/60m
[dim]the gradients of a run as it is now: of its finished model or its newest checkpoint[/]

galore inspect --run runs/60m --fresh --steps 200 --every 10
[dim]those of its first steps, made again[/]

galore inspect --run runs/60m --lr 1e-12
[dim]while the weights stand still: what a basis loses then is the noise of the batch[/]

galore inspect --model FOLDER --data texts/ --rank 64
[dim]a causal model on plain text[/]

galore inspect --model FacebookAI/roberta-base --task classify --data reviews.csv --label-column stars
[dim]a classifier on rows, as galore finetune has them[/]

[bold]The recommendation[/]

The rank is the least multiple of --rank-multiple whose basis captures --capture-share of the gradient one look later.

The gap is the longest after which bases still capture --keep-share of what young ones do.

Both are rules of thumb: see the curves.
"""

_RUN = "Inspection"
_LOADING = "Loading Transformers"
_COMMAND = "galore inspect"


def inspect(
    *,
    run: Annotated[
        Path | None, typer.Option(help="Run folder of a galore pretrain or finetune.", rich_help_panel=_RUN)
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="Of a run, make its first steps again from its first weights.", rich_help_panel=_RUN
        ),
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Folder, or name on the Hugging Face Hub, of a model.", rich_help_panel=_RUN)
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="What that model learns from: a file or folder.", rich_help_panel=_RUN)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help=r"Folder to make. [dim]\[default: runs/inspect-NAME][/]", rich_help_panel=_RUN)
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print inspection.json; progress goes to stderr.", rich_help_panel=_RUN)
    ] = False,
    **given: Any,
) -> None:
    """Look at gradients: how few dimensions hold them, and for how many steps the same few do.

    Makes some steps on a copy of the model, looks at the gradients on the way and changes nothing of the run.
    The folder gets report.html, its pictures as PNG and inspection.json.
    """
    folder = out or Path("runs") / f"inspect-{_name(run, model)}"
    written: list[Path] = []
    with stoppable(
        lambda: f"Stopped after the end: {folder} is written." if written else "Stopped. Nothing was written."
    ):
        console = Console(stderr=json)
        with reported_errors(_COMMAND):
            config = configure(**given)
            subject = _subject(run, model, data, given, config, folder, console, fresh=fresh)
        found = _observed(subject, config, console)
        with console.status("Drawing"):
            from galore_torch.training.inspection import report

            made = report.files(found, shlex.join(["galore", *sys.argv[1:]]))
        with deferred():
            write(made, folder)
            written.append(folder)
        if json:
            print(json_format.dumps(found.as_json()))
        else:
            _show(found, folder, console)


def _name(run: Path | None, model: str | None) -> str:
    path = run if run is not None else Path(model or "")
    return path.resolve().name if path.exists() else path.name


def _subject(
    run: Path | None,
    model: str | None,
    data: str | None,
    given: dict[str, Any],
    config: InspectConfig,
    out: Path,
    console: Console,
    *,
    fresh: bool,
) -> Subject:
    """Judge all that was asked for, the cheap first, then load it."""
    _require_one_subject(run, model, data, given, config, fresh=fresh)
    require_free(out)
    with console.status(_LOADING):
        from galore_torch.training.inspection import of_model, of_run
        from galore_torch.training.run.machine import ignore_accelerate, require_one_process
    require_one_process()
    ignore_accelerate(console)
    if run is not None:
        place = of_run.require_run(run, fresh)
        return of_run.subject_of_run(run, place, config.looks, console)
    return of_model.subject_of_model(of_model.recipe_of(str(model), data, config), config, console)


def _require_one_subject(
    run: Path | None, model: str | None, data: str | None, given: dict[str, Any], config: InspectConfig, *, fresh: bool
) -> None:
    if run is None and model is None:
        raise ValueError("run = None and model = None leave nothing to inspect; give --run, or --model with --data.")
    if run is not None:
        if model is not None:
            raise ValueError(f"model = {model!r} and run = {str(run)!r} are two things to inspect; give one of them.")
        also = [field.name for field in dataclasses.fields(SubjectConfig) if given.get(field.name) is not None]
        also = ["data", *also] if data is not None else also
        if also:
            raise ValueError(f"run = {str(run)!r} has its own {', '.join(also)}; leave that out, or give --model.")
        if fresh and config.looks.lr is not None:
            raise ValueError(
                f"lr = {config.looks.lr} and --fresh, which goes by the run's own schedule; leave out one."
            )
        return
    if fresh:
        raise ValueError(
            f"fresh = True is for a run, whose first weights are known; leave it out with model = {model!r}."
        )
    if data is None and config.data.task not in GLUE:
        raise ValueError(f"data = None leaves model = {model!r} without gradients; give --data FILE.")


def _observed(subject: Subject, config: InspectConfig, console: Console) -> Inspection:
    """Make the steps and look. An error on the way is ours, and no one's request: it is not told in a line."""
    from galore_torch.training.inspection.session import session

    with ExitStack() as ready:
        with reported_errors(_COMMAND):
            steps = ready.enter_context(session(subject, config, console))
        console.print(steps.announcement, highlight=False, soft_wrap=True)
        steps.make_steps()
        with reported_errors(_COMMAND):
            return steps.conclude()


def _show(found: Inspection, out: Path, console: Console) -> None:
    from galore_torch.training.inspection import report

    console.print(report.table(found))
    for text in (report.legend(found), report.rule(found), *found.notes):
        console.print(text, highlight=False, markup=False)
    line = f"report {out}/report.html  figures {out}/inspection.json"
    console.print(line, soft_wrap=True, highlight=False, markup=False)
