"""The settings of a pre-training: a frozen dataclass a section, for flags, ``--config`` and run folder alike."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galore_torch.training.run.folder import RunFolder
from galore_torch.training.settings import sections
from galore_torch.training.settings.adapter import AdapterConfig, resolved
from galore_torch.training.settings.fields import check, setting, write_toml
from galore_torch.training.settings.optimizer import DTYPES, OptimizerConfig, refuse_beside_adapter
from galore_torch.training.text.config import DataConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The LLaMA that is trained."""

    hidden: int = setting(512, "Width of the residual stream.", minimum=1)
    intermediate: int = setting(1376, "Width inside the MLPs.", minimum=1)
    layers: int = setting(8, "Number of layers.", minimum=1)
    heads: int = setting(8, "Number of attention heads; must divide hidden into even parts.", minimum=1)
    dtype: str = setting("bfloat16", "What weights and activations are stored in.", choices=DTYPES)

    def __post_init__(self) -> None:
        check(self)
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"heads = {self.heads} does not divide hidden = {self.hidden} into heads of even width; "
                "choose hidden as a multiple of 2 * heads."
            )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long, in which portions, and what is recorded on the way."""

    steps: int = setting(10_000, "Optimizer steps.", minimum=1)
    batch: int = setting(512, "Sequences a step.", minimum=1)
    micro_batch: int = setting(32, "Sequences at once; bounds memory and changes nothing else.", minimum=1)
    gradient_checkpointing: bool = setting(
        False, "Keep no activations inside the layers: the backward computes them again, in a third more time."
    )
    warmup: float = setting(0.1, "Share of the steps over which the learning rate rises from 0.", minimum=0, below=1)
    final_lr: float = setting(0.1, "Where the cosine ends, as a share of the peak.", minimum=0, maximum=1)
    seed: int = setting(
        0, "Seed of the weights, of the order of the text and of random bases.", minimum=0, maximum=2**32 - 1
    )
    eval_every: int = setting(1000, "Steps between two evaluations; 0 evaluates at the end only.", minimum=0)
    save_every: int = setting(
        1000, "Steps between two resumable checkpoints; 0 saves at the end and on Ctrl-C.", minimum=0
    )
    report_to: str = setting(
        "none", "Trackers to report to, as Trainer names them (wandb, tensorboard, ...), by comma."
    )

    def __post_init__(self) -> None:
        check(self)
        if self.batch % self.micro_batch:
            raise ValueError(
                f"micro_batch = {self.micro_batch} does not divide batch = {self.batch}; choose a divisor of the batch."
            )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """All that decides a pre-training's outcome. Made by `configure`, kept in the run folder as ``config.toml``."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    adapter: AdapterConfig
    schedule: ScheduleConfig

    def __post_init__(self) -> None:
        adapter = resolved(self.adapter, rank=self.optimizer.rank, steps=self.schedule.steps)
        object.__setattr__(self, "adapter", adapter)
        refuse_beside_adapter(self.adapter, self.optimizer)
        if self.optimizer.update == "backward" and self.schedule.micro_batch != self.schedule.batch:
            raise ValueError(
                f"update = 'backward' applies each gradient at once, and micro_batch = {self.schedule.micro_batch} "
                f"makes several of a batch of {self.schedule.batch}; give both the same value, or update = 'step'."
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.schedule.batch * self.data.seq

    @property
    def title(self) -> str:
        """What is trained in a word or two: the optimizer's name, after the adapter's if there is one."""
        adapter, optimizer = self.adapter.adapter, self.optimizer.optim
        return optimizer if adapter == "none" else f"{adapter}-{optimizer}"

    def to_toml(self) -> str:
        """The whole configuration as TOML, which `configure` reads back."""
        return write_toml(dataclasses.asdict(self))


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "adapter": AdapterConfig,
    "schedule": ScheduleConfig,
}
"""Every section by its name in TOML and in `PretrainConfig`. No two sections share a setting's name."""


def from_values(values: Mapping[str, Any]) -> PretrainConfig:
    """Make a configuration from settings by name, whatever their section.

    Raises:
        ValueError: when a name is unknown or a value is not allowed.
    """
    return PretrainConfig(**sections.made(values, SECTIONS, "a pre-training"))


def read_values(path: Path) -> tuple[str | None, dict[str, Any]]:
    """What a TOML file gives: the ``preset`` that it names before its sections, if any, and the settings by name.

    Raises:
        ValueError: when the file cannot be read or a setting stands in the wrong section.
    """
    return sections.read_values(path, SECTIONS)


def recorded(folder: RunFolder) -> PretrainConfig:
    """The configuration that a run was started with.

    Raises:
        ValueError: when it is not as it was written.
    """
    folder.require_settings()
    return from_values(read_values(folder.config)[1])
