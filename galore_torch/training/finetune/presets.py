"""Presets: the paper's recipe for GLUE (arXiv 2403.03507), and places to start from for rows of one's own."""

from pathlib import Path
from typing import Any

from galore_torch.training.finetune.config import SECTIONS, FinetuneConfig
from galore_torch.training.finetune.tasks import GLUE
from galore_torch.training.pretrain.presets import FULL_RANK, PROJECTED, kind_of
from galore_torch.training.settings import sections
from galore_torch.training.settings.methods import over_file, refuse_unheeded
from galore_torch.training.settings.optimizer import own_defaults

_ROBERTA = {"model": "FacebookAI/roberta-base", "epochs": 30.0, "batch": 16, "max_length": 512}
PRESETS: dict[str, dict[str, Any]] = {
    "glue-rank4": {**_ROBERTA, "rank": 4, "scale": 4.0},
    "glue-rank8": {**_ROBERTA, "rank": 8, "scale": 2.0},
    "classify": {"rank": 8, "scale": 2.0, "epochs": 3.0, "batch": 32, "max_length": 256, "warmup": 0.1},
    "sft": {"rank": 64, "scale": 1.0, "epochs": 1.0, "batch": 8, "max_length": 512, "warmup": 0.1},
}
"""Settings of each preset by name."""

BY_TASK: dict[str, dict[str, dict[str, Any]]] = {
    "glue-rank4": {"cola": {"batch": 32}},
    "glue-rank8": {"cola": {"batch": 32}},
}
"""What a preset sets besides for one task."""

# The paper's lie between 1e-5 and 3e-5, by task. LoRA, whose product begins at zero, wants more.
_GLUE_LR = {PROJECTED: 2e-5, FULL_RANK: 2e-5, "lora": 5e-4, "relora": 5e-4}

# Of rank 8 and scale 2, GaLore wanted five times AdamW's on a small encoder; docs/results.md has the figures.
LEARNING_RATES: dict[str, dict[str, float]] = {
    "glue-rank4": _GLUE_LR,
    "glue-rank8": _GLUE_LR,
    "classify": {PROJECTED: 5e-4, FULL_RANK: 1e-4, "lora": 1e-3, "relora": 1e-3},
    "sft": {PROJECTED: 1e-4, FULL_RANK: 2e-5, "lora": 2e-4, "relora": 2e-4},
}
"""Peak learning rates of each preset, for optimizers that project, for those that do not, and for adapters by name."""


def configure(
    preset: str | None = None, file: Path | None = None, *, method: str | None = None, **given: Any
) -> FinetuneConfig:
    """A preset, overridden by a TOML file, by a method and by settings by name; what is None is not given.

    Args:
        preset: a key of `PRESETS`; if None, what the file names as ``preset``, or the task's.
        file: a TOML file with sections, such as a run folder's ``config.toml``.
        method: a key of `galore_torch.training.settings.methods.METHODS`.
        given: settings by name, such as ``rank=4``.

    Returns:
        The whole configuration, with the learning rate that the preset has for what is trained.

    Raises:
        ValueError: when the preset, the method, a setting or a value is not known or not allowed.

    >>> config = configure(task="cola", method="lora")
    >>> config.schedule.batch, config.optimizer.lr, config.adapter.adapter_rank
    (32, 0.0005, 4)
    """
    flags = {name: value for name, value in given.items() if value is not None}
    named, values = (None, {}) if file is None else sections.read_values(file, SECTIONS)
    settings = over_file(values, method, flags)
    task = str(settings.get("task", "classify"))
    preset = preset or named or ("glue-rank4" if task in GLUE else "sft" if task == "sft" else "classify")
    if preset not in PRESETS:
        raise ValueError(f"preset = {preset!r} is not known; choose one of {', '.join(PRESETS)}.")
    start = {**PRESETS[preset], **BY_TASK.get(preset, {}).get(task, {})}
    config = made({**start, **settings})  # judges every value, before the learning rate depends on one
    trained = config.adapter.adapter if config.adapter.adapter != "none" else kind_of(config.optimizer.optim)
    start |= own_defaults(config.optimizer.optim)
    config = made({**start, "lr": LEARNING_RATES[preset][trained], **settings})
    refuse_unheeded(method, flags, config.optimizer, config.adapter)
    return config


def made(values: dict[str, Any]) -> FinetuneConfig:
    """A configuration from settings by name.

    Raises:
        ValueError: when a name is unknown or a value is not allowed.
    """
    return FinetuneConfig(**sections.made(values, SECTIONS, "a fine-tuning"))
