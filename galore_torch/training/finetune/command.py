"""``galore finetune``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from galore_torch.training.finetune.config import FinetuneConfig
from galore_torch.training.finetune.presets import PRESETS, configure
from galore_torch.training.run.command import PANEL, Config, Json, Out, Resume, run_command
from galore_torch.training.settings.fields import given_settings
from galore_torch.training.settings.methods import TUNING, help_text

if TYPE_CHECKING:
    from galore_torch.training.run.job import Job

HELP_PRESET = "classify"
"""The preset whose values ``--help`` shows."""

EPILOG = f"""[bold]Examples[/]

galore finetune --task rte
[dim]RoBERTa on a task of GLUE, by the paper's recipe at rank 4[/]

galore finetune --data reviews.csv --text-column review --label-column stars --model MODEL
[dim]rows of your own: classes or numbers, as the labels are[/]

galore finetune --task sft --data chats.jsonl --model FOLDER --gguf-file NAME.gguf
[dim]a causal model on messages, prompt and completion, or text[/]

galore finetune --task dpo --data pairs.jsonl --model runs/chats
[dim]preference pairs, from the model of a run; --task reward makes a reward model of them[/]

galore finetune --task grpo --data arithmetic --model MODEL
[dim]sums, rewarded by a rule[/]

galore finetune --resume --out runs/rte
[dim]go on after Ctrl-C[/]

{help_text(TUNING)}"""

_PRESET = typer.Option(
    help=f"Recipe to start from: {', '.join(PRESETS)}; by default the task's.", rich_help_panel=PANEL
)
_METHOD = typer.Option(
    help=rf"What is trained, and how: {', '.join(TUNING)}. [dim]\[default: galore][/]", rich_help_panel=PANEL
)


def finetune(
    *,
    preset: Annotated[str | None, _PRESET] = None,
    method: Annotated[str | None, _METHOD] = None,
    config: Config = None,
    out: Out = None,
    resume: Resume = False,
    json: Json = False,
    **given: Any,
) -> None:
    """Fine-tune a model: classes or numbers of texts, or a causal model on examples.

    The run folder gets config.toml, metrics.jsonl, predictions.jsonl, the model with its tokenizer and loss.png.
    Ctrl-C finishes the step, saves a checkpoint and says how to go on.
    It runs on a GPU if there is one; CUDA_VISIBLE_DEVICES chooses which, and is empty for the CPU.
    """
    given = given_settings(given)

    def configured() -> tuple[FinetuneConfig, str]:
        settings = configure(preset, config, method=method, **given)
        return settings, f"{settings.data.task}-{method or settings.title}"

    options = {"preset": preset, "method": method, "config": config, **given}
    run_command(load, "finetune", configured, options, out=out, resume=resume, json=json)


def load() -> type[Job]:
    """Import what its runs are of, with Transformers."""
    from galore_torch.training.finetune.run import Finetuning

    return Finetuning
