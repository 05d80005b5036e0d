"""What can be compared: pre-trainings and fine-tunings, and how the two differ to a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from galore_torch.training.finetune import command as finetune
from galore_torch.training.finetune import presets as finetune_presets
from galore_torch.training.pretrain import command as pretrain
from galore_torch.training.pretrain import presets as pretrain_presets
from galore_torch.training.run.records import Record
from galore_torch.training.settings.config import PresetTable

if TYPE_CHECKING:
    from galore_torch.training.run.job import Job


@dataclass(frozen=True)
class Amount:
    """How much a run sees: equal for all runs of a comparison.

    >>> str(Amount(409_600, "tokens")), str(Amount(1, "epochs"))
    ('409,600 tokens', '1 epoch')
    """

    count: float
    unit: str

    def __str__(self) -> str:
        count = f"{self.count:,.0f}" if self.count == int(self.count) else f"{self.count:g}"
        return f"{count} {self.unit[:-1] if self.count == 1 else self.unit}"


@dataclass(frozen=True, kw_only=True)
class ComparedJob:
    """A command of ``galore`` whose runs can be compared."""

    name: str  # of the command
    presets: PresetTable[Any]  # by which every configuration is made
    help_preset: str  # the preset whose values ``--help`` shows
    methods: tuple[str, ...]  # what is compared by default
    load: Callable[[], type[Job]]  # imports what the runs are of, with Transformers
    prepare: Callable[[Any, Console], None] | None = None  # reads and caches the data for all runs, if that takes long
    unit: str  # what its records count: tokens or examples
    held_out: str  # what it is evaluated on, in a word
    libraries: tuple[str, ...]  # whose versions a report names, beside torch's and Transformers'
    amount: Callable[[Any], Amount]  # how much a run with a configuration sees
    scores: Callable[[Record], Mapping[str, Any]]  # a final record's scores by name, the main one first


def _rows(config: Any) -> Amount:
    length = config.schedule
    return Amount(length.steps * length.batch, "examples") if length.steps else Amount(length.epochs, "epochs")


PRETRAIN = ComparedJob(
    name="pretrain",
    presets=pretrain_presets.PRESET_TABLE,
    help_preset=pretrain_presets.DEFAULT_PRESET,
    methods=("full", "galore"),
    load=pretrain.load,
    prepare=pretrain.prepare_only,
    unit="tokens",
    held_out="text",
    libraries=("datasets", "tokenizers"),
    amount=lambda config: Amount(config.tokens_per_step * config.schedule.steps, "tokens"),
    scores=lambda final: {"perplexity": final["perplexity"]},
)

FINETUNE = ComparedJob(
    name="finetune",
    presets=finetune_presets.PRESET_TABLE,
    help_preset=finetune.HELP_PRESET,
    methods=("full", "galore", "lora"),
    load=finetune.load,
    unit="examples",
    held_out="rows",
    libraries=("datasets", "trl", "peft"),
    amount=_rows,
    scores=lambda final: final["scores"],
)

JOBS = {job.name: job for job in (PRETRAIN, FINETUNE)}
"""By name; the first is meant where none is named."""
