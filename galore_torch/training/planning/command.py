"""``galore plan``: from a model's name to a table of what each method needs."""

from __future__ import annotations

import json as json_format
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from galore_torch.training.planning.config import LIKE, OF_A_STEP, RUN, Cards
from galore_torch.training.pretrain.config import PretrainConfig
from galore_torch.training.pretrain.presets import CONTINUED, DEFAULT_PRESET, PRESETS, configure
from galore_torch.training.run.command import loading, option, reported_errors, table_of, this_command
from galore_torch.training.run.files import require_writable
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.model_files import require_length
from galore_torch.training.run.names import local_path, model_of_run, require_json, require_model
from galore_torch.training.run.signals import stoppable
from galore_torch.training.settings.config import sections_of
from galore_torch.training.settings.fields import field_names, given_settings, require_once, suggest, with_settings
from galore_torch.training.settings.methods import METHODS, has_effect, method_settings, refuse_without_any_effect
from galore_torch.training.settings.optimizer import missing_library
from galore_torch.units import parse_bytes

EPILOG = """[bold]Examples[/]

galore plan llama-7b --memory 24GB
[dim]every method, and the best that fits[/]

galore plan FOLDER/config.json --micro-batch 4 --seq 1024 --method full --method galore --rank 256
[dim]any causal, masked or sequence-to-sequence model of Transformers, without its weights[/]

galore plan llama-7b --world-size 8 --parallel fsdp --bandwidth 100gbit --tokens 20B --tokens-per-second 3000
[dim]what each of eight processes needs and sends, and the days it takes[/]

galore plan runs/mine --memory 24GB --seq 1024
[dim]a run, with its settings but for those that are given[/]
"""

_COMMAND = "galore plan"
_MODELS = [name for name in PRESETS if name != CONTINUED]  # presets that say of which sizes a model is
_option = partial(option, panel="Plan")


def plan(
    model: Annotated[
        str, typer.Argument(help="A preset, a run, a folder, a config.json, or a name on the Hugging Face Hub.")
    ],
    *,
    memory: Annotated[str | None, _option("What there is, such as 24GB; says which methods fit.")] = None,
    method: Annotated[list[str] | None, _option(r"Plan these alone. [dim]\[default: all; of a run: run][/]")] = None,
    dtype: Annotated[str | None, _option("Of weights; by default the preset's or run's, else bfloat16.")] = None,
    page: Annotated[Path | None, _option("Write a page with the table and a chart there.")] = None,
    json: Annotated[bool, _option("Print the plans as one JSON object.", "--json")] = False,
    **given: Any,
) -> None:
    """Say what a training will need of memory, by method, before anything of it is allocated.

    The real model, optimizer and hooks make their steps on tensors that have sizes and no numbers.
    """
    given = given_settings(given)
    of_cards = {name: given.pop(name) for name in field_names(Cards) if name in given}
    with stoppable():
        console = Console(stderr=json)
        with reported_errors(_COMMAND):
            room, cards = None if memory is None else parse_bytes(memory), Cards(**of_cards)
            model, run = _found(model)
            named = method or ([RUN] if run else [])
            require_once("method", named)
            left_out = _without_library(named, run)
            require_length("seq", given.get("seq", 0), model)
            _require_settings(model if model in _MODELS else LIKE, named or METHODS, given)
            if page is not None:
                if page.is_dir():
                    raise ValueError(f"page = {str(page)!r} is a folder; name a file, such as {page / 'plan.html'}.")
                require_writable("page", page)
            if "torch" not in sys.modules:  # bitsandbytes has functions compiled as it is imported, which no plan calls
                os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
            with loading(console):
                from galore_torch.training.planning.report import Planned
                from galore_torch.training.planning.subject import subject

            planned = subject(model, given, dtype, cards, run)
            if not named:
                left_out |= {name: f"{why}." for name in METHODS if (why := planned.refusal(name))}
            methods = named or [name for name in METHODS if name not in left_out]
            refuse_without_any_effect(given, {name: planned.alone(name) for name in methods})
            with console.status("Planning") as status:
                shown = Planned.of(planned, methods, room, left_out, lambda name: status.update(f"{name} is planned"))
                texts = shown.texts
            if page is not None:
                shown.page(this_command()).write(page)
        if json:
            print(json_format.dumps(shown.as_json()))
            return
        console.print(shown.title, highlight=False, markup=False)
        for columns, rows in shown.tables:
            console.print(table_of(columns, rows), "")
        for text in texts:
            console.print(text, highlight=False, markup=False)


def command() -> Callable[..., None]:
    """The command, with a flag for each setting of cards and methods, and for those of a step alone of the others."""
    sections = sections_of(PretrainConfig)
    del sections["model"]
    hidden = {*field_names(sections["data"], sections["schedule"])} - {*OF_A_STEP, *field_names(Cards)}
    return with_settings(plan, {"cards": Cards, **sections}, PRESETS, DEFAULT_PRESET, hidden)


def _found(name: str) -> tuple[str, dict[str, Any]]:
    """A preset, or where a model's configuration is, or a ValueError; and the settings of the run that made it."""
    if name in _MODELS:
        return name, {}
    folder, name = RunFolder(local_path("model", name)), model_of_run("model", name)
    path = local_path("model", name)
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".json" and file.is_file():
        require_json("model", name, file)
    elif path.exists() or "/" in name:
        require_model("model", name)
    else:
        close = suggest(name, _MODELS)
        raise ValueError(f"model = {name!r} is no preset, folder or file; {close.rstrip('.')}, or give a folder.")
    return name, folder.settings() if folder.config.is_file() else {}


def _require_settings(preset: str, methods: Iterable[str], given: dict[str, Any]) -> None:
    """Refuse settings that methods cannot have before libraries are imported; how a batch is divided is seen later."""
    for method in (name for name in methods if name != RUN):
        alone = configure(preset, method=method, batch=1, micro_batch=1)
        kept = {name: one for name, one in given.items() if has_effect(name, alone.optimizer, alone.adapter)}
        configure(preset, method=method, **{**kept, "batch": 1, "micro_batch": 1})


def _without_library(named: Sequence[str], run: dict[str, Any]) -> dict[str, str]:
    """The methods whose library is missing, with how to install it; an ImportError for those that are named."""
    optims = {name: (run if run and name == RUN else method_settings(name))["optim"] for name in named or METHODS}
    missing = {name: told for name, optim in optims.items() if (told := missing_library(optim))}
    if missing and named:
        raise ImportError(next(iter(missing.values())))
    return missing
