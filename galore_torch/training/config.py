"""The settings of a pre-training: a frozen dataclass a section, for flags, ``--config`` and run folder alike."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galore_torch.training import optimizers, sections
from galore_torch.training.adapter_config import AdapterConfig, resolved
from galore_torch.training.settings import check, setting, write_toml

_PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
_DECOMPOSITIONS = ("svd", "randomized", "warm", "random")
_DTYPES = ("float32", "bfloat16")
_GRADIENTS = ("full", "projected", "fused")
_UPDATES = ("step", "backward")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The LLaMA that is trained."""

    hidden: int = setting(512, "Width of the residual stream.", minimum=1)
    intermediate: int = setting(1376, "Width inside the MLPs.", minimum=1)
    layers: int = setting(8, "Number of layers.", minimum=1)
    heads: int = setting(8, "Number of attention heads; must divide hidden into even parts.", minimum=1)
    dtype: str = setting("bfloat16", "What weights and activations are stored in.", choices=_DTYPES)

    def __post_init__(self) -> None:
        check(self)
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"heads = {self.heads} does not divide hidden = {self.hidden} into heads of even width; "
                "choose hidden as a multiple of 2 * heads."
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text that it is trained on."""

    data: str = setting(
        "stdlib",
        "What to train on: stdlib (the Python standard library's own sources, no download), allenai/c4 or any other "
        "data set of the Hugging Face Hub (streamed), or a file or folder of text, JSON lines or Parquet.",
    )
    subset: str | None = setting(None, "Which configuration of a Hub data set.", shown="en for allenai/c4")
    text_column: str = setting("text", "Which column of a Hub data set, JSON lines or Parquet holds the text.")
    tokenizer: str = setting(
        "auto",
        "train (byte-level BPE, trained on the spot and cached), or the name or folder of a ready one. auto is t5-base "
        "for a Hub data set, as in the paper, and train for local text.",
    )
    vocab: int = setting(
        32000, "Entries of a tokenizer that is trained on the spot; a ready one brings its own.", minimum=260
    )
    seq: int = setting(256, "Length of a sequence, in tokens; documents are packed into sequences.", minimum=2)
    eval_tokens: int = setting(10_000_000, "Held-out text for the perplexity, in tokens, at most.", minimum=2)
    cache: str | None = setting(
        None, "Folder for trained tokenizers and tokenized text.", shown="$GALORE_CACHE or ~/.cache/galore-torch"
    )

    def __post_init__(self) -> None:
        check(self)
        if not self.data.strip():
            raise ValueError(f"data = {self.data!r} names nothing; give stdlib, a Hub data set, a file or a folder.")
        if self.eval_tokens < self.seq:
            raise ValueError(
                f"eval_tokens = {self.eval_tokens} is less than one sequence; give at least seq = {self.seq}."
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What moves the weights."""

    optimizer: str = setting(
        "galore-adamw",
        f"One of {', '.join(optimizers.NAMES)}. A galore- optimizer projects the attention's and the MLPs' matrices.",
        choices=optimizers.NAMES,
    )
    lr: float = setting(0.01, "Peak learning rate.", above=0, shown="by preset and method")
    others_lr: float | None = setting(
        None,
        "Peak learning rate of what is never projected: embeddings, head, norms.",
        above=0,
        shown="the preset's if --lr is not given, else lr",
    )
    rank: int = setting(128, "Rank of the subspace, in dimensions.", minimum=1)
    gap: int = setting(200, "Steps between two renewals of a basis.", minimum=1)
    scale: float = setting(0.25, "Factor on the update that comes back from the subspace.", above=0)
    proj_type: str = setting("std", "Which side is projected: std is the shorter one.", choices=_PROJ_TYPES)
    decomposition: str = setting(
        "warm", f"How a basis is found: {', '.join(_DECOMPOSITIONS)}.", choices=_DECOMPOSITIONS
    )
    stagger: bool = setting(True, "Let the layers take turns in renewing, so that no step pays for all.")
    cos_threshold: float | None = setting(
        None,
        "Renew lazily: a layer's gap grows while successive subspaces overlap by this much, from 0 (as random ones do) "
        "to 1; it shrinks again, down to gap, where they move.",
        minimum=0,
        maximum=1,
        shown="renew at the fixed gap; qgalore-adamw8bit: 0.4",
    )
    gamma_proj: float = setting(2.0, "Factor by which a lazy layer's gap grows and shrinks.", above=1)
    queue_size: int = setting(5, "How many of a layer's last overlaps are averaged for that.", minimum=1)
    beta1: float = setting(0.9, "Decay of the first moment (momentum, for SGD) per step.", minimum=0, below=1)
    beta2: float = setting(0.999, "Decay of the second moment per step.", minimum=0, below=1)
    eps: float = setting(1e-8, "Added to the root of the second moment.", above=0)
    weight_decay: float = setting(0.0, "Decoupled weight decay per unit of learning rate.", minimum=0)
    clip: float = setting(
        0.0,
        "Clip the gradient to this norm; 0 clips nothing.",
        minimum=0,
        shown="0; llama-7b with a full-rank optimizer: 1",
    )
    state_dtype: str | None = setting(
        None,
        f"What the moments are stored in ({', '.join(optimizers.heeding('state_dtype'))} only).",
        choices=_DTYPES,
        shown="as the weights; galore-adafactor: float32",
    )
    basis_bits: int = setting(
        16,
        "Bits of the bases' numbers: 16 (as the weights), 8 or 4 (galore- optimizers only).",
        choices=(16, 8, 4),
        shown="16; qgalore-adamw8bit: 4",
    )
    image_bits: int = setting(
        16, "Bits of the projected gradients that wait for the step: 16 (as the weights), 8 or 4.", choices=(16, 8, 4)
    )
    gradients: str = setting(
        "full",
        "How gradients are formed (galore- optimizers only): full, projected at once, or fused (never formed).",
        choices=_GRADIENTS,
        shown="full; llama-7b with a galore- optimizer: fused",
    )
    update: str = setting(
        "step",
        "When gradients are applied: at the step, or layer by layer inside the backward, which leaves nothing to clip "
        "or to accumulate.",
        choices=_UPDATES,
        shown="step; llama-7b with a galore- optimizer: backward",
    )
    weight_bits: int = setting(
        16, "Bits of the projected weights: 16 (as the dtype says) or 8 (galore- optimizers only).", choices=(16, 8)
    )
    weight_rounding: str = setting(
        "stochastic",
        "How INT8 weights are rounded after an update: up or down at random, so that updates smaller than a code "
        "count on average, or to the nearest.",
        choices=("stochastic", "nearest"),
    )

    def __post_init__(self) -> None:
        check(self)
        _refuse_without_projection(self)
        if self.state_dtype is not None and not optimizers.heeds(self.optimizer, "state_dtype"):
            raise ValueError(
                f"state_dtype = {self.state_dtype!r} has no effect on {self.optimizer!r}; leave it out, or choose one "
                f"of {', '.join(optimizers.heeding('state_dtype'))}."
            )
        if self.weight_bits == 16 and self.weight_rounding == "nearest":
            raise ValueError("weight_rounding = 'nearest' is for weights in few bits; give weight_bits = 8 with it.")
        if self.image_bits != 16 and (self.gradients == "full" or self.update == "backward"):
            raise ValueError(
                f"image_bits = {self.image_bits}, and no projected gradients wait with gradients = {self.gradients!r}, "
                f"update = {self.update!r}; leave it out, or use projected or fused with update = 'step'."
            )
        if self.update == "backward" and self.gradients == "projected":
            raise ValueError("gradients = 'projected' waits for the step; with update = 'backward' use full or fused.")
        if self.update == "backward" and self.clip:
            raise ValueError(
                f"clip = {self.clip} and update = 'backward', which leaves nothing to clip; give clip = 0, or "
                "update = 'step'."
            )


PROJECTED_ONLY = (
    "state_dtype",
    "weight_bits",
    "basis_bits",
    "cos_threshold",
    "image_bits",
    "gradients",
    "weight_rounding",
)
"""Settings that say nothing to an optimizer that does not project, and that are refused with one."""


def _refuse_without_projection(config: OptimizerConfig) -> None:
    """Settings that only an optimizer that projects can heed must be as they are by default for the others."""
    if optimizers.is_projected(config.optimizer):
        return
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in PROJECTED_ONLY and value != field.default:
            raise ValueError(
                f"{field.name} = {value!r} is for the galore- optimizers, not for {config.optimizer!r}; leave it out."
            )


def refuse_beside_adapter(adapter: AdapterConfig, config: OptimizerConfig) -> None:
    """Refuse an optimizer's settings that an adapter excludes.

    Raises:
        ValueError: when they train the whole matrices or move weights where an adapter cannot follow.
    """
    if adapter.adapter == "none":
        return
    if optimizers.is_projected(config.optimizer):
        full_rank = ", ".join(name for name in optimizers.NAMES if not optimizers.is_projected(name))
        raise ValueError(
            f"adapter = {adapter.adapter!r} and optimizer = {config.optimizer!r}, which projects what has a low rank "
            f"already; choose one of {full_rank} (method = {adapter.adapter!r} does), or adapter = 'none'."
        )
    if config.update == "backward":
        raise ValueError(
            f"update = 'backward' and adapter = {adapter.adapter!r}, whose few gradients wait for the step; leave out "
            "one of them."
        )
    if adapter.adapter == "relora" and 0 < adapter.restart_prune < 1 and not optimizers.is_prunable(config.optimizer):
        raise ValueError(
            f"restart_prune = {adapter.restart_prune} would pick numbers from the state of "
            f"optimizer = {config.optimizer!r}, which does not keep them one by one; give restart_prune = 1."
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long, in which portions, and what is recorded on the way."""

    steps: int = setting(10_000, "Optimizer steps.", minimum=1)
    batch: int = setting(512, "Sequences a step.", minimum=1)
    micro_batch: int = setting(32, "Sequences at once; bounds memory and changes nothing else.", minimum=1)
    checkpointing: bool = setting(
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
        adapter, optimizer = self.adapter.adapter, self.optimizer.optimizer
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
