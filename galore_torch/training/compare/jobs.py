"""What can be compared: pre-trainings and fine-tunings, and how the two differ to a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from galore_torch.training.finetune import config as finetune
from galore_torch.training.finetune import presets as finetune_presets
from galore_torch.training.pretrain import config as pretrain
from galore_torch.training.pretrain import presets as pretrain_presets
from galore_torch.training.pretrain.command import prepare_only
from galore_torch.training.run.records import Record

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
    """A command of ``galore`` whose runs can be compared.

    Attributes:
        name: of the command.
        doing: what a run of it is, for messages.
        load: imports what the runs are of, with Transformers.
        prepare: reads and caches the data for all runs, if that takes long; takes a configuration and a console.
        unit: what its records count: tokens or examples.
        held_out: what it is evaluated on, in a word.
        libraries: whose versions a report names, beside torch's and Transformers'.
        methods: what is compared by default.
        sections: the dataclass of each section of settings by its name.
        presets: what presets set, by their names.
        shown: the preset whose values ``--help`` shows.
        configure: makes a run's whole configuration from a preset's name and settings.
        title: names a comparison by its preset and settings, for its folder.
        amount: how much a run with a configuration sees.
        scores: a final record's scores by name, the main one first.
    """

    name: str
    doing: str
    load: Callable[[], type[Job]]
    prepare: Callable[[Any, Console], None] | None = None
    unit: str
    held_out: str
    libraries: tuple[str, ...]
    methods: tuple[str, ...]
    sections: Mapping[str, type]
    presets: Mapping[str, Mapping[str, Any]]
    shown: str
    configure: Callable[..., Any]
    title: Callable[[str | None, Mapping[str, Any]], str]
    amount: Callable[[Any], Amount]
    scores: Callable[[Record], Mapping[str, Any]]


def _pretraining() -> type[Job]:
    from galore_torch.training.pretrain.run import Pretraining

    return Pretraining


def _finetuning() -> type[Job]:
    from galore_torch.training.finetune.run import Finetuning

    return Finetuning


def _rows(config: finetune.FinetuneConfig) -> Amount:
    steps, schedule = config.schedule.steps, config.schedule
    return Amount(schedule.epochs, "epochs") if steps is None else Amount(steps * schedule.batch, "examples")


PRETRAIN = ComparedJob(
    name="pretrain",
    doing="a pre-training",
    load=_pretraining,
    prepare=prepare_only,
    unit="tokens",
    held_out="text",
    libraries=("datasets", "tokenizers"),
    methods=("full", "galore"),
    sections=pretrain.SECTIONS,
    presets=pretrain_presets.PRESETS,
    shown="llama-60m",
    configure=pretrain_presets.configure,
    title=lambda preset, _: preset or pretrain_presets.DEFAULT_PRESET,
    amount=lambda config: Amount(config.tokens_per_step * config.schedule.steps, "tokens"),
    scores=lambda final: {"perplexity": final["perplexity"]},
)

FINETUNE = ComparedJob(
    name="finetune",
    doing="a fine-tuning",
    load=_finetuning,
    unit="examples",
    held_out="rows",
    libraries=("datasets", "trl", "peft"),
    methods=("full", "galore", "lora"),
    sections=finetune.SECTIONS,
    presets=finetune_presets.PRESETS,
    shown="glue-rank4",
    configure=finetune_presets.configure,
    title=lambda preset, given: str(given.get("task") or preset or "classify"),
    amount=_rows,
    scores=lambda final: final["scores"],
)

JOBS = {job.name: job for job in (PRETRAIN, FINETUNE)}
"""By name; the first is meant where none is named."""
