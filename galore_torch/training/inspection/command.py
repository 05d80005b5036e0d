"""``galore inspect``: from flags to snapshots of gradients, and from their figures to screen and folder."""

from __future__ import annotations

import json as json_format
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console

from galore_torch.training.finetune.config import GLUE
from galore_torch.training.inspection.config import InspectConfig, ModelDataConfig, configure, recipe_of
from galore_torch.training.pretrain.config import PretrainConfig
from galore_torch.training.run.command import loading, option, reported_errors, this_command
from galore_torch.training.run.files import require_empty, require_writable, write_folder
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.model_files import require_length
from galore_torch.training.run.signals import NOTHING_WRITTEN, deferred, stoppable
from galore_torch.training.settings.fields import field_names

if TYPE_CHECKING:
    from galore_torch.training.inspection.jobs import InspectedJob

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

The rank is the least multiple of --rank-multiple whose basis captures --capture-share of the next snapshot's gradient.
The gap is the longest after which bases still capture --keep-share of what young ones do. Both are rules of thumb.
With --state-budget the ranks that capture most within it are recommended, up to --capture-share.
A line has the flags by which galore pretrain and galore finetune train by them.
"""

_COMMAND = "galore inspect"
_option = partial(option, panel="Inspection")


def inspect(
    *,
    run: Annotated[Path | None, _option("Run folder of a galore pretrain or finetune.")] = None,
    fresh: Annotated[bool, _option("Make a run's first steps again, from its first weights.", "--fresh")] = False,
    model: Annotated[str | None, _option("Folder, or name on the Hugging Face Hub, of a model.")] = None,
    data: Annotated[str | None, _option("What that model learns from: a file or folder.")] = None,
    out: Annotated[Path | None, _option(r"Folder to make. [dim]\[default: runs/inspect-NAME][/]")] = None,
    json: Annotated[bool, _option("Print inspection.json; progress goes to stderr.", "--json")] = False,
    **given: Any,
) -> None:
    """Look at gradients: how few dimensions hold them, and for how many steps the same few do.

    Makes some steps on a copy of the model, takes snapshots of the gradients on the way and changes nothing of the run.
    The folder gets report.html, its plots as PNG and inspection.json.
    """
    path = run if run is not None else Path(model or "")
    folder = out or Path("runs") / f"inspect-{path.resolve().name if path.exists() else path.name}"
    left = NOTHING_WRITTEN
    with stoppable(lambda: left):
        console = Console(stderr=json)
        with reported_errors(_COMMAND):
            config = configure(**given)
            _require_one_subject(run, model, data, given, config, fresh=fresh)
            require_empty(folder)
            require_writable("out", folder)
            with loading(console):
                from galore_torch.training.inspection import jobs, report
                from galore_torch.training.run.callbacks import quiet
                from galore_torch.training.run.machine import ignore_accelerate
                from galore_torch.training.run.processes import require_one
            require_one()
            ignore_accelerate(console)
            quiet(console)
            if run is None:
                inspected = jobs.job_of_model(str(model), data, config, console)
            else:
                inspected = jobs.job_of_run(run, config.snapshots, console, fresh=fresh)
        found = _observed(inspected, config, console)
        with console.status("Drawing"):
            files = report.files(found, this_command())
        with deferred():
            write_folder(files, folder)
            left = f"Stopped after the end: {folder} is written."
        if json:
            print(json_format.dumps(found))
            return
        console.print(report.table(found), "")
        for text in (*report.texts(found), f"report {folder}/report.html  figures {folder}/inspection.json"):
            console.print(text, highlight=False, markup=False, soft_wrap=text.startswith((report.BY_IT, "report ")))


def _require_one_subject(
    run: Path | None, model: str | None, data: str | None, given: dict[str, Any], config: InspectConfig, *, fresh: bool
) -> None:
    of_model = ["data", *field_names(ModelDataConfig)]
    also = ", ".join(name for name in of_model if {"data": data, **given}.get(name) is not None)
    lr, needs_data, subject = config.snapshots.lr, config.data.task not in GLUE, f"run = {str(run)!r}"
    wrong = {
        "run = None and model = None leave nothing to inspect; give --run, or --model with --data.": not (run or model),
        f"model = {model!r} and {subject} are two things to inspect; give one of them.": run and model,
        f"{subject} has its own {also}; leave that out, or give --model.": run and also,
        f"lr = {lr} and --fresh, which goes by the run's own schedule; leave out one.": run and fresh and lr,
        f"fresh = True is for a run, whose first weights are known; leave it out with model = {model!r}.": (
            fresh and not run
        ),
        f"data = None leaves model = {model!r} without gradients; give --data FILE.": not (run or data) and needs_data,
    }
    for message, applies in wrong.items():
        if applies:
            raise ValueError(message)
    if model is not None:
        recipe = recipe_of(model, data, config)
        length = recipe.data.seq if isinstance(recipe, PretrainConfig) else recipe.data.max_length
        require_length("max_length", length, str(recipe.model.model))  # which text calls otherwise
        recipe.require_there()
    elif run is not None and not RunFolder(run).config.is_file():
        is_model = (run / "config.json").is_file()
        remedy = f"give it as --model {run}" if is_model else "give the folder of a galore pretrain or finetune"
        raise ValueError(f"{subject} holds no config.toml, so it is no run folder; {remedy}.")


def _observed(inspected: InspectedJob, config: InspectConfig, console: Console) -> dict[str, Any]:
    """Make the steps. An error on the way is a fault of ours, not of what was asked for: it has its traceback."""
    from galore_torch.training.inspection.figures import figures
    from galore_torch.training.inspection.observer import GradientObserver, observed_trainer
    from galore_torch.training.run.callbacks import StepProgress

    progress = StepProgress(console, steps=config.snapshots.last, every=config.snapshots.every)
    with tempfile.TemporaryDirectory(prefix="galore-inspect-") as scratch:
        with reported_errors(_COMMAND):
            observer = GradientObserver(inspected, config)
            trainer = observed_trainer(observer, scratch, progress)
        console.print(observer.announcement, highlight=False, soft_wrap=True)
        try:
            trainer.train()
        finally:
            progress.stop()
    with reported_errors(_COMMAND):
        return figures(observer)
