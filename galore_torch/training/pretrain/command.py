"""``galore pretrain``: from flags to a run, and from its result to the screen."""

from __future__ import annotations

import dataclasses
import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from galore_torch.training.pretrain.config import PretrainConfig
from galore_torch.training.pretrain.presets import DEFAULT_PRESET, PRESETS, configure
from galore_torch.training.run.errors import told, writes_told
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.stopping import RunLeft, exit_status, left_of, stoppable
from galore_torch.training.run.units import duration, megabytes
from galore_torch.training.settings.methods import METHODS, described

if TYPE_CHECKING:
    from galore_torch.training.pretrain.run import PretrainResult, PretrainRun

EXAMPLES = """[bold]Examples[/]

galore pretrain
[dim]a tiny LLaMA on the Python standard library's sources, in minutes on a CPU[/]

galore pretrain --preset llama-60m --data allenai/c4 --out runs/60m
[dim]the paper's 60M model and recipe[/]

galore pretrain --preset llama-60m --data texts/ --rank 64 --lr 5e-3 --steps 2000
[dim]text of your own[/]

galore pretrain --preset llama-60m --data allenai/c4 --method lora
[dim]a baseline of the paper, at equal rank, tokens and steps[/]

galore pretrain --resume --out runs/60m
[dim]go on after Ctrl-C[/]
"""

SHOWN = "llama-60m"
"""The preset whose values ``--help`` shows."""

EPILOG = f"{EXAMPLES}\n{described()}"
"""What ``--help`` ends with."""

_RUN = "Run"
# What is shown while Transformers is imported, only when it is needed: a wrong flag is to be told at once.
_LOADING = "Loading Transformers"


def pretrain(
    *,
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"Model and recipe to start from: {', '.join(PRESETS)}. Flags and --config override it. "
            rf"[dim]\[default: {DEFAULT_PRESET}][/]",
            rich_help_panel=_RUN,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"What is trained, and how, as the paper compares it: {', '.join(METHODS)}. Overrides preset and "
            "--config; flags override it.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file of settings, such as a run folder's config.toml.", rich_help_panel=_RUN),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help=r"Run folder to make. [dim]\[default: runs/PRESET-METHOD][/]", rich_help_panel=_RUN),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, by its own settings.", rich_help_panel=_RUN)
    ] = False,
    prepare: Annotated[
        bool,
        typer.Option(
            "--prepare", help="Only read, tokenize and cache the text, for runs to come.", rich_help_panel=_RUN
        ),
    ] = False,
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the result as one JSON object; progress goes to stderr.", rich_help_panel=_RUN
        ),
    ] = False,
    **given: Any,
) -> None:
    """Pre-train a LLaMA from scratch, with GaLore or with a method to compare it with.

    The run folder gets config.toml, metrics.jsonl, subspaces.jsonl (the renewals of bases), the model with its
    tokenizer, loss.png and a resumable checkpoint.
    Ctrl-C finishes the step, saves a checkpoint and says how to go on.
    """
    given = {name: value for name, value in given.items() if value is not None}
    left = RunLeft("galore pretrain")
    with stoppable(left):
        others = {"preset": preset, "method": method, "config": config}
        _pretrain(others, given, out=out, resume=resume, prepare=prepare, json=json, left=left)


def _pretrain(
    others: dict[str, Any],
    given: dict[str, Any],
    *,
    out: Path | None,
    resume: bool,
    prepare: bool,
    json: bool,
    left: RunLeft,
) -> None:
    """What `pretrain` does with its options, ``others`` being those that name settings by the dozen."""
    console = Console(stderr=json)
    preset, method, config = others["preset"], others["method"], others["config"]
    with told("galore pretrain"):
        if resume:
            run = _resumed(RunFolder.to_resume(out, {**others, **given}), console, left)
        elif prepare:
            _prepare(configure(preset, config, method=method, **given), console)
            return
        else:
            settings = configure(preset, config, method=method, **given)
            start = preset or (DEFAULT_PRESET if config is None else config.stem)
            run = _new(settings, out or Path("runs") / f"{start}-{method or settings.title}", console, left)
    with writes_told("galore pretrain", lambda: left_of(run.folder, "galore pretrain")):
        result = run.train()
    if json:
        print(json_format.dumps(dataclasses.asdict(result)))
    else:
        show(result, console)
    if not result.finished:
        raise typer.Exit(exit_status())


def _new(settings: PretrainConfig, out: Path, console: Console, left: RunLeft) -> PretrainRun:
    RunFolder(out).require_new()
    left.at_work_in(out, resumed=False)
    with console.status(_LOADING):
        from galore_torch.training.pretrain.run import new_run
    return new_run(settings, out, console=console)


def _resumed(out: Path, console: Console, left: RunLeft) -> PretrainRun:
    left.at_work_in(out, resumed=True)
    with console.status(_LOADING):
        from galore_torch.training.pretrain.run import resumed_run
    return resumed_run(out, console=console)


def _prepare(settings: PretrainConfig, console: Console) -> None:
    with console.status(_LOADING):
        from galore_torch.training.text.prepare import amount, cache_folder, prepare_text
    text = prepare_text(settings.data, console, batch=settings.schedule.batch, seed=settings.schedule.seed)
    console.print(
        f"{settings.data.data} is ready: {amount(text, settings.data)}; cached in {cache_folder(settings.data)}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def show(result: PretrainResult, console: Console) -> None:
    """Print what a run came to, and what to do with it."""
    if not result.finished:
        console.print(
            f"Stopped after step {result.step:,}. It is saved in {result.checkpoint}; go on with:",
            soft_wrap=True,
            markup=False,
        )
        console.print(f"  galore pretrain --resume --out {result.out}", soft_wrap=True, highlight=False, markup=False)
        return
    console.print(
        f"perplexity {result.perplexity:,.2f}  {result.tokens_per_second:,.0f} tok/s  "
        f"optimizer state {megabytes(result.state_bytes)}  peak memory {megabytes(result.peak_memory_bytes)}  "
        f"{duration(result.seconds)} of training",
        soft_wrap=True,
    )
    console.print(
        f"model {result.out}/model  metrics {result.out}/metrics.jsonl  plot {result.out}/loss.png",
        soft_wrap=True,
        markup=False,
    )
