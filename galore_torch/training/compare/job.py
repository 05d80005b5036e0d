"""What can be compared: pre-trainings and fine-tunings, and how the two differ to a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from galore_torch.training.finetune import config as tuning
from galore_torch.training.finetune import presets as tuning_presets
from galore_torch.training.finetune.config import FinetuneConfig
from galore_torch.training.pretrain import config as pretraining
from galore_torch.training.pretrain import presets as pretrain_presets
from galore_torch.training.pretrain.config import PretrainConfig
from galore_torch.training.run.records import Record
from galore_torch.training.settings.fields import typed_fields


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
class Job:
    """A command of ``galore`` whose runs can be compared.

    Attributes:
        subcommand: its name.
        doing: what a run of it is, for messages.
        unit: what its records count: tokens or examples.
        held_out: what it is judged on, in a word.
        prepares: whether its ``--prepare`` reads the data before the runs do.
        libraries: which versions a report tells, beside torch's and Transformers'.
        methods: what is compared if nobody says.
        sections: the dataclass of each section of settings by its name.
        shared: settings that make two runs incomparable if they differ.
        presets: what presets set, by their names.
        shown: the preset whose values ``--help`` shows.
        configure: makes a run's whole configuration from a preset's name and settings.
        title: names a comparison by its preset and settings, for its folder.
        amount: how much a run with a configuration sees.
        scores: a final record's scores by name, the main one first.
    """

    subcommand: str
    doing: str
    unit: str
    held_out: str
    prepares: bool
    libraries: tuple[str, ...]
    methods: tuple[str, ...]
    sections: Mapping[str, type]
    shared: frozenset[str]
    presets: Mapping[str, Mapping[str, Any]]
    shown: str
    configure: Callable[..., Any]
    title: Callable[[str | None, Mapping[str, Any]], str]
    amount: Callable[[Any], Amount]
    scores: Callable[[Record], Mapping[str, Any]]


def _names(*sections: type) -> frozenset[str]:
    return frozenset(field.name for section in sections for field, _ in typed_fields(section))


def _tokens(config: PretrainConfig) -> Amount:
    return Amount(config.tokens_per_step * config.schedule.steps, "tokens")


def _rows(config: FinetuneConfig) -> Amount:
    steps, schedule = config.schedule.steps, config.schedule
    return Amount(schedule.epochs, "epochs") if steps is None else Amount(steps * schedule.batch, "examples")


PRETRAIN = Job(
    subcommand="pretrain",
    doing="a pre-training",
    unit="tokens",
    held_out="text",
    prepares=True,
    libraries=("datasets", "tokenizers"),
    methods=("full", "galore"),
    sections=pretraining.SECTIONS,
    shared=_names(pretraining.ModelConfig, pretraining.DataConfig) - {"dtype"},
    presets=pretrain_presets.PRESETS,
    shown="llama-60m",
    configure=pretrain_presets.configure,
    title=lambda preset, _: preset or pretrain_presets.DEFAULT_PRESET,
    amount=_tokens,
    scores=lambda final: {"perplexity": final["perplexity"]},
)

FINETUNE = Job(
    subcommand="finetune",
    doing="a fine-tuning",
    unit="examples",
    held_out="rows",
    prepares=False,
    libraries=("datasets", "trl", "peft"),
    methods=("full", "galore", "lora"),
    sections=tuning.SECTIONS,
    shared=_names(tuning.BaseModelConfig, tuning.RowsConfig) - {"dtype", "target_modules"},
    presets=tuning_presets.PRESETS,
    shown="glue-rank4",
    configure=tuning_presets.configure,
    title=lambda preset, given: str(given.get("task") or preset or "classify"),
    amount=_rows,
    scores=lambda final: final["scores"],
)
