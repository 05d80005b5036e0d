"""``galore pretrain``: what it does beside its settings, each of which is a field in a config.py and a flag by that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from galore_torch.training.pretrain.config import PretrainConfig
from galore_torch.training.pretrain.presets import CONTINUED, DEFAULT_PRESET, PRESET_TABLE, PRESETS, configure
from galore_torch.training.run.command import PANEL, Config, Json, Out, Resume, run_command
from galore_torch.training.settings.fields import given_settings
from galore_torch.training.settings.methods import METHODS, help_text

if TYPE_CHECKING:
    from galore_torch.training.run.job import Job

EPILOG = f"""[bold]Examples[/]

galore pretrain
[dim]a tiny LLaMA on the Python standard library's sources, in minutes on a CPU[/]

galore pretrain --preset llama-60m --data allenai/c4 --out runs/60m
[dim]the paper's 60M model and recipe[/]

galore pretrain --preset llama-60m --data texts/ --rank 64 --lr 5e-3 --steps 2000
[dim]text of your own[/]

galore pretrain --preset llama-60m --data allenai/c4 --method lora
[dim]a baseline of the paper, at equal rank, tokens and steps[/]

galore pretrain --model MODEL_OR_FOLDER --data texts/
[dim]continue any causal model, or a run's (--model runs/60m), with its tokenizer[/]

galore pretrain --config-of MODEL_OR_CONFIG_JSON --data texts/ --rank 64
[dim]any causal architecture from scratch[/]

galore pretrain --resume --out runs/60m
[dim]go on after Ctrl-C; with --steps 20000 make it longer, finished or not[/]

{help_text()}"""

_PRESET = typer.Option(
    help=f"Model and recipe to start from: {', '.join(PRESETS)}. Flags and --config override it. "
    rf"[dim]\[default: {DEFAULT_PRESET}; with --model: {CONTINUED}][/]",
    rich_help_panel=PANEL,
)
_METHOD = typer.Option(
    help=f"What is trained, and how, as the paper compares it: {', '.join(METHODS)}. Overrides preset and "
    rf"--config; flags override it. [dim]\[default: galore][/]",
    rich_help_panel=PANEL,
)
_PREPARE = typer.Option(
    "--prepare", help="Only read, tokenize and cache the text, for runs to come.", rich_help_panel=PANEL
)


def pretrain(
    *,
    preset: Annotated[str | None, _PRESET] = None,
    method: Annotated[str | None, _METHOD] = None,
    config: Config = None,
    out: Out = None,
    resume: Resume = False,
    prepare: Annotated[bool, _PREPARE] = False,
    json: Json = False,
    **given: Any,
) -> None:
    """Pre-train a causal model, from scratch or further, with GaLore or with a method to compare it with.

    The run folder gets config.toml, metrics.jsonl, subspaces.jsonl (the renewals of bases), the model with its
    tokenizer, loss.png and a resumable checkpoint.
    Ctrl-C finishes the step, saves a checkpoint and says how to go on.
    It runs on a GPU if there is one; CUDA_VISIBLE_DEVICES chooses which, and is empty for the CPU.
    """
    given = given_settings(given)

    def configured() -> tuple[PretrainConfig, str]:
        settings = configure(preset, config, method=method, **given)
        start = preset or (PRESET_TABLE.default(given) if config is None else config.stem)
        _warn_of_rates(start, settings, given)
        return settings, f"{start}-{method or settings.title}"

    options = {"preset": preset, "method": method, "config": config, **given}
    instead = prepare_only if prepare else None
    run_command(load, "pretrain", configured, options, out=out, resume=resume, json=json, instead=instead)


def _warn_of_rates(preset: str, config: PretrainConfig, given: dict[str, Any]) -> None:
    """Say for how long a run learning rates were tuned, where this one is much shorter."""
    tuned, steps = PRESETS.get(preset, {}).get("steps", 0), config.schedule.steps
    if preset != CONTINUED and "lr" not in given and 2 * steps < tuned:
        lr, others = config.optimizer.lr, config.optimizer.others_lr or config.optimizer.lr
        line = (
            f"The learning rates of {preset} are for {tuned:,} steps, not {steps:,}, in which they may be too much: "
            f"try --lr {lr / 2:g} --others-lr {min(lr, others) / 2:g}."
        )
        Console(stderr=True).print(line, soft_wrap=True, highlight=False)


def load() -> type[Job]:
    """Import what its runs are of, with Transformers."""
    from galore_torch.training.pretrain.run import Pretraining

    return Pretraining


def prepare_only(settings: PretrainConfig, console: Console) -> None:
    """Read, tokenize and cache the text, and say where it is."""
    with console.status("Loading Transformers"):
        from galore_torch.training.pretrain.run import text_of
        from galore_torch.training.run.callbacks import quiet
        from galore_torch.training.text.packing import cache_folder
    quiet(console)
    text = text_of(settings, console)
    line = f"{settings.data.data} is ready: {text.amount}; cached in {cache_folder(settings.data)}"
    console.out(line, highlight=False)
