"""``galore pretrain``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from galore_torch.training.pretrain.config import PretrainConfig
from galore_torch.training.pretrain.presets import CONTINUED, DEFAULT_PRESET, PRESET_TABLE, PRESETS
from galore_torch.training.run.command import loading
from galore_torch.training.run.job_command import Amount, JobCommand

_HELP = """Pre-train a causal model, from scratch or further, with GaLore or with a method to compare it with.

The run folder gets config.toml, metrics.jsonl, subspaces.jsonl (the renewals of bases), the model with its
tokenizer, loss.png and a resumable checkpoint."""

_EXAMPLES = """galore pretrain
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
"""


def _warn_of_rates(preset: str, config: PretrainConfig, given: Mapping[str, Any]) -> None:
    """Say for how long a run learning rates were tuned, where this one is much shorter."""
    tuned, steps = PRESETS.get(preset, {}).get("steps", 0), config.schedule.steps
    if preset != CONTINUED and "lr" not in given and 2 * steps < tuned:
        lr, others = config.optimizer.lr, config.optimizer.others_lr or config.optimizer.lr
        line = (
            f"The learning rates of {preset} are for {tuned:,} steps, not {steps:,}, in which they may be too much: "
            f"try --lr {lr / 2:g} --others-lr {min(lr, others) / 2:g}."
        )
        Console(stderr=True).print(line, soft_wrap=True, highlight=False)


def _prepare(settings: PretrainConfig, console: Console) -> None:
    with loading(console):
        from galore_torch.training.pretrain.run import text_of
        from galore_torch.training.run.callbacks import quiet
        from galore_torch.training.text.packing import cache_folder
    quiet(console)
    text = text_of(settings, console)
    line = f"{settings.data.data} is ready: {text.amount}; cached in {cache_folder(settings.data)}"
    console.out(line, highlight=False)


PRETRAIN = JobCommand(
    name="pretrain",
    help=_HELP,
    examples=_EXAMPLES,
    presets=PRESET_TABLE,
    preset_help=rf"Flags and --config override it. [dim]\[default: {DEFAULT_PRESET}; with --model: {CONTINUED}][/]",
    help_preset=DEFAULT_PRESET,
    methods=("full", "galore"),
    job="galore_torch.training.pretrain.run:Pretraining",
    prepare=_prepare,
    advise=_warn_of_rates,
    unit="tokens",
    held_out="text",
    libraries=("datasets", "tokenizers"),
    amount=lambda config: Amount(config.tokens_per_step * config.schedule.steps, "tokens"),
    scores=lambda final: {"perplexity": final["perplexity"]},
)
