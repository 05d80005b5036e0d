"""``galore evaluate`` and ``galore predict``: what a finished run, or any model, comes to on some data."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from galore_torch.training.finetune.config import FinetuneConfig
from galore_torch.training.finetune.presets import configure as configure_rows
from galore_torch.training.pretrain.presets import CONTINUED
from galore_torch.training.pretrain.presets import configure as configure_text
from galore_torch.training.run import records
from galore_torch.training.run.command import Json, loading, option, reported_errors
from galore_torch.training.run.files import require_writable, write_whole
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.model_files import require_length
from galore_torch.training.run.names import local_path, model_of_run
from galore_torch.training.run.signals import stoppable
from galore_torch.training.settings.config import from_values
from galore_torch.training.settings.fields import given_settings

EXAMPLES = """[bold]Examples[/]

galore {name} runs/reviews
[dim]on what the run held out[/]

galore {name} runs/reviews --data new.csv
[dim]on rows of your own, by the run's columns[/]

galore {name} MODEL --task sft --data chats.jsonl
[dim]any model; without a task, on packed text as in pre-training[/]
"""

_OF_TRAINING = ("held_out", "held_out_share", "packing", "beta", "generations")
NOT_HEEDED = {"evaluate": {*_OF_TRAINING, "answers"}, "predict": {*_OF_TRAINING, "answers_only"}}
"""Settings of rows that change nothing of what each command says: their flags are not offered."""

_OF_TEXT = ("data", "subset", "text_column", "cache", "seq", "eval_tokens", "dtype")

_MODEL = "Folder of a run, whose settings hold but for those that are given, or name or folder of a model."
Model = Annotated[str, typer.Argument(help=_MODEL, metavar="RUN_OR_MODEL")]
File = Annotated[Path | None, option("File of predictions; by default the screen.")]


def evaluate(model: Model, *, json: Json = False, **given: Any) -> None:
    """Score a run or a model: accuracy and the like of rows with labels, perplexity of text or answers."""
    _judge("evaluate", model, given, json=json)


def predict(model: Model, *, out: File = None, **given: Any) -> None:
    """Say what a run or a model makes of rows: a JSON line each, with row, input, expected, prediction, probability."""
    _judge("predict", model, given, out=out)


def _judge(name: str, model: str, given: dict[str, Any], *, json: bool = False, out: Path | None = None) -> None:
    console, predicting = Console(stderr=True), name == "predict"
    with stoppable(), reported_errors(f"galore {name}"):
        if out is not None:
            if out.exists():
                raise ValueError(f"out = {str(out)!r} exists; choose another --out.")
            require_writable("out", out)
        given = given_settings(given)
        config, others = settings_of(model, given, predicting=predicting)
        require_length("max_length", given.get("max_length", 0), config.model.model)  # which text calls otherwise
        config.require_there("predict" if predicting and "label_column" not in given else "evaluate")
        with loading(console):
            from galore_torch.training.evaluation.judge import judge
        scores, lines = judge(config, console, predicting=predicting, others=others)
        text = "".join(map(records.line, lines))
        if not predicting:
            text = "  ".join(f"{key} {value:,.4f}" for key, value in scores.items()) + "\n"
            text = json_format.dumps(scores) + "\n" if json else text
        typer.echo(text.encode(), nl=False) if out is None else write_whole(out, text)  # UTF-8, whatever the terminal's


def settings_of(model: str, given: dict[str, Any], *, predicting: bool = False) -> tuple[Any, bool]:
    """The settings by which a model is judged, its run's or a task's own, and whether it has other data.

    Args:
        model: folder of a run, or name or folder of a model; a ValueError says why it cannot be judged.
        given: settings of the data by name, which override the run's.
        predicting: whether rows are to be predicted, which text has not.
    """
    folder, data = RunFolder(local_path("model", model)), given.get("data")
    length: dict[str, Any] = {"seq": given["max_length"]} if "max_length" in given else {}
    values: dict[str, Any] = {}
    if folder.config.is_file():
        values, model = folder.settings(), model_of_run("model", model)
        values.pop("gguf_file", None)
    elif data is None:
        wrong, remedy = "is no folder of a run or a model", "one that exists, or a model of the Hub with --data"
        if folder.root.exists():
            wrong, remedy = "is no run that has data of its own", "--data"
        raise ValueError(f"model = {model!r} {wrong}; give {remedy}.")
    if "task" in values:
        others = {} if data is None else {"held_out": data}
        return from_values(FinetuneConfig, {**values, **others, **given, "model": model}), data is not None
    if "task" in given:
        return configure_rows(model=model, **{"held_out": data, **given}), True
    if predicting:
        raise ValueError(
            f"model = {model!r} is no run of galore finetune, and text has no rows to predict; give the folder of such "
            "a run, or --task and --data."
        )
    for key, value in given.items():
        if key not in ("data", "text_column", "max_length"):
            raise ValueError(
                f"{key} = {value!r} has no effect on packed text, by which this model is judged; leave it out, or "
                "give --task."
            )
    kept = {key: values[key] for key in _OF_TEXT if key in values and (key != "subset" or data is None)}
    named = {key: given[key] for key in ("data", "text_column") if key in given}
    return configure_text(CONTINUED, model=model, **(kept | named | length)), data is not None
