"""``galore finetune``."""

from __future__ import annotations

from galore_torch.training.finetune.config import FinetuneConfig
from galore_torch.training.finetune.presets import PRESET_TABLE
from galore_torch.training.run.job_command import Amount, JobCommand
from galore_torch.training.settings.methods import TUNING

_HELP = """Fine-tune a model: classes or numbers of texts, or a causal model on examples.

The run folder gets config.toml, metrics.jsonl, predictions.jsonl, the model with its tokenizer and loss.png."""

_EXAMPLES = """galore finetune --task rte
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
"""


def _amount(config: FinetuneConfig) -> Amount:
    length = config.schedule
    return Amount(length.steps * length.batch, "examples") if length.steps else Amount(length.epochs, "epochs")


FINETUNE = JobCommand(
    name="finetune",
    help=_HELP,
    examples=_EXAMPLES,
    presets=PRESET_TABLE,
    preset_help=r"Flags and --config override it. [dim]\[default: the task's][/]",
    help_preset="classify",
    offered=TUNING,
    methods=("full", "galore", "lora"),
    job="galore_torch.training.finetune.run:Finetuning",
    unit="examples",
    held_out="rows",
    libraries=("datasets", "trl", "peft"),
    amount=_amount,
    scores=lambda final: final["scores"],
)
