"""Presets: the paper's models with the paper's recipe (arXiv 2403.03507, section 5), and the demo's."""

from pathlib import Path
from typing import Any

from galore_torch.training.pretrain.config import PretrainConfig, from_values, read_values
from galore_torch.training.settings.methods import over_file, refuse_unheeded
from galore_torch.training.settings.optimizer import is_projected, own_defaults

DEFAULT_PRESET = "llama-tiny"

# Sequence 256, batch 512, cosine to 10 %, 10 % warm-up, BF16, no decay, betas .9/.999 are the settings' own defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "llama-tiny": {
        "hidden": 256, "intermediate": 688, "layers": 4, "heads": 4, "rank": 64, "dtype": "float32", "vocab": 2048,
        "seq": 128, "steps": 400, "batch": 8, "micro_batch": 8, "update_proj_gap": 50, "eval_tokens": 65_536,
        "eval_every": 200, "save_every": 0,
    },
    "llama-60m": {
        "hidden": 512, "intermediate": 1376, "layers": 8, "heads": 8, "rank": 128, "steps": 10_000,
        "micro_batch": 128,
    },
    "llama-130m": {
        "hidden": 768, "intermediate": 2048, "layers": 12, "heads": 12, "rank": 256, "steps": 20_000,
        "micro_batch": 64,
    },
    "llama-350m": {
        "hidden": 1024, "intermediate": 2736, "layers": 24, "heads": 16, "rank": 256, "steps": 60_000,
        "micro_batch": 32,
    },
    "llama-1b": {
        "hidden": 2048, "intermediate": 5461, "layers": 24, "heads": 32, "rank": 512, "steps": 100_000,
        "micro_batch": 16,
    },
    "llama-7b": {
        "hidden": 4096, "intermediate": 11008, "layers": 32, "heads": 32, "rank": 1024, "steps": 150_000,
        "optim": "galore-adamw8bit", "update_proj_gap": 500,
        # Weights that move inside the backward leave nothing to accumulate. The paper's 512 are for 64 GPUs.
        "batch": 16, "micro_batch": 16, "gradient_checkpointing": True,
    },
}  # fmt: skip
"""Settings of each preset by name. What a preset leaves out has the setting's own default."""

PROJECTED, FULL_RANK = "projected", "full rank"

BY_OPTIMIZER: dict[str, dict[str, dict[str, Any]]] = {
    "llama-7b": {
        # The paper clips at 1.0. Where each layer moves as soon as its gradient is there, nothing is left to clip.
        PROJECTED: {"update": "backward"},
        FULL_RANK: {"max_grad_norm": 1.0},
        "galore-adamw8bit": {"basis_bits": 8},
    },
}
"""What a preset sets besides, for optimizers that project, for those that do not, and for one by its name."""

_BASELINES_LR = {FULL_RANK: {"lr": 0.001}, "low-rank": {"lr": 0.001}, "lora": {"lr": 0.005}, "relora": {"lr": 0.005}}
_PAPER_LR = {PROJECTED: {"lr": 0.01}, **_BASELINES_LR}

LEARNING_RATES: dict[str, dict[str, dict[str, float]]] = {
    # Tuned at the demo's length, ReLoRA's after LoRA's; docs/decisions.md has the table.
    "llama-tiny": {
        PROJECTED: {"lr": 0.01, "others_lr": 0.04},
        FULL_RANK: {"lr": 0.001, "others_lr": 0.04},
        "low-rank": {"lr": 0.001, "others_lr": 0.04},
        "lora": {"lr": 0.0025, "others_lr": 0.04},
        "relora": {"lr": 0.00125, "others_lr": 0.04},
    },
    "llama-60m": _PAPER_LR,
    "llama-130m": _PAPER_LR,
    "llama-350m": _PAPER_LR,
    "llama-1b": _PAPER_LR,
    "llama-7b": {PROJECTED: {"lr": 0.005}, **_BASELINES_LR},
}
"""Peak learning rates of each preset, for optimizers that project, for those that do not, and for adapters by name.

The paper tunes its baselines over 1e-2 to 1e-4 and does not tell the winners: 1e-3 is a place to start from. LoRA,
whose product begins at zero and counts a fraction, wants more.
"""


def learning_rates(preset: str, optimizer: str, adapter: str = "none") -> dict[str, float]:
    """The preset's peak learning rates for what is trained: ``lr`` and, where it differs, ``others_lr``."""
    return LEARNING_RATES[preset][kind_of(optimizer) if adapter == "none" else adapter]


def kind_of(optimizer: str) -> str:
    """`PROJECTED` or `FULL_RANK`."""
    return PROJECTED if is_projected(optimizer) else FULL_RANK


def configure(
    preset: str | None = None, file: Path | None = None, *, method: str | None = None, **given: Any
) -> PretrainConfig:
    """A preset, overridden by a TOML file, by a method and by settings by name; what is None is not given.

    A method brings the preset's learning rates for it: the file's were for what the file trains.

    Args:
        preset: a key of `PRESETS`; if None, what the file names as ``preset``, or `DEFAULT_PRESET`.
        file: a TOML file with sections, such as a run folder's ``config.toml``.
        method: a key of `galore_torch.training.settings.methods.METHODS`.
        given: settings by name, such as ``rank=256``.

    Returns:
        The whole configuration, with the learning rates that the preset has for what is trained.

    Raises:
        ValueError: when the preset, the method, a setting or a value is not known or not allowed.

    >>> configure("llama-60m", steps=500).optimizer.lr
    0.01
    >>> configure("llama-60m", method="full").optimizer.lr
    0.001
    """
    flags = {name: value for name, value in given.items() if value is not None}
    named, values = (None, {}) if file is None else read_values(file)
    preset = preset or named or DEFAULT_PRESET
    if preset not in PRESETS:
        raise ValueError(f"preset = {preset!r} is not known; choose one of {', '.join(PRESETS)}.")
    settings = over_file(values, method, flags)
    config = from_values({**PRESETS[preset], **settings})  # judges every value, before others depend on one
    optimizer, adapter = config.optimizer.optim, config.adapter.adapter
    by_optimizer = BY_OPTIMIZER.get(preset, {})
    besides = {**own_defaults(optimizer), **by_optimizer.get(kind_of(optimizer), {}), **by_optimizer.get(optimizer, {})}
    rates = {} if "lr" in settings else learning_rates(preset, optimizer, adapter)
    config = from_values({**PRESETS[preset], **besides, **rates, **settings})
    refuse_unheeded(method, flags, config.optimizer, config.adapter)
    return config
