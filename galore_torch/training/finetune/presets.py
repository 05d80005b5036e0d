"""Presets: the paper's recipe for GLUE (arXiv 2403.03507), and places to start from for rows of one's own."""

from collections.abc import Mapping
from typing import Any

from galore_torch.training.finetune.config import DEFAULT_MODEL, GLUE, ON_TRL, FinetuneConfig
from galore_torch.training.settings.config import FULL_RANK, PROJECTED, PresetTable

_ROBERTA = {"model": DEFAULT_MODEL, "epochs": 30.0, "batch": 16, "max_length": 512}
_CAUSAL = {"rank": 64, "scale": 1.0, "epochs": 1.0, "batch": 8, "max_length": 512, "warmup": 0.1}
PRESETS: dict[str, dict[str, Any]] = {
    "glue-rank4": {**_ROBERTA, "rank": 4, "scale": 4.0},
    "glue-rank8": {**_ROBERTA, "rank": 8, "scale": 2.0},
    "classify": {"rank": 8, "scale": 2.0, "epochs": 3.0, "batch": 32, "max_length": 256, "warmup": 0.1},
    "sft": _CAUSAL,
    "dpo": _CAUSAL,
    "reward": _CAUSAL,
    "grpo": {**_CAUSAL, "batch": 32, "steps": 200},
}
"""Settings of each preset by name."""

BY_TASK: dict[str, dict[str, dict[str, Any]]] = {
    "glue-rank4": {"cola": {"batch": 32}},
    "glue-rank8": {"cola": {"batch": 32}},
}
"""What a preset sets besides for one task."""

# Those of Muon's sizes of update are AdamW's, by convention (arXiv 2502.16982).
# The paper's lie between 1e-5 and 3e-5, by task. LoRA, whose product begins at zero, wants more.
_GLUE_LR = {PROJECTED: 2e-5, FULL_RANK: 2e-5, "galore-muon": 2e-5, "lora": 5e-4, "relora": 5e-4}

# Of rank 8 and scale 2, GaLore wanted five times AdamW's on a small encoder; docs/results.md has the figures.
LEARNING_RATES: dict[str, dict[str, float]] = {
    "glue-rank4": _GLUE_LR,
    "glue-rank8": _GLUE_LR,
    "classify": {PROJECTED: 5e-4, FULL_RANK: 1e-4, "galore-muon": 1e-4, "lora": 1e-3, "relora": 1e-3},
    "sft": {PROJECTED: 1e-4, FULL_RANK: 2e-5, "galore-muon": 2e-5, "lora": 2e-4, "relora": 2e-4},
    "dpo": {PROJECTED: 3e-5, FULL_RANK: 5e-6, "galore-muon": 5e-6, "lora": 5e-5, "relora": 5e-5},
    "reward": {PROJECTED: 1e-4, FULL_RANK: 2e-5, "galore-muon": 2e-5, "lora": 2e-4, "relora": 2e-4},
    "grpo": {PROJECTED: 6e-6, FULL_RANK: 1e-6, "galore-muon": 1e-6, "lora": 1e-5, "relora": 1e-5},
}
"""Peak learning rates of each preset, for optimizers that project, for those that do not, and for adapters by name."""


def _default(given: Mapping[str, Any]) -> str:
    task = given.get("task", "classify")
    return "glue-rank4" if task in GLUE else str(task) if task in ON_TRL else "classify"


PRESET_TABLE = PresetTable(
    config=FinetuneConfig,
    presets=PRESETS,
    default=_default,
    besides=lambda preset, _, given: BY_TASK.get(preset, {}).get(str(given.get("task")), {}),
    rates={name: {kind: {"lr": rate} for kind, rate in rates.items()} for name, rates in LEARNING_RATES.items()},
)
configure = PRESET_TABLE.configure
"""Makes the configuration of a fine-tuning; see `galore_torch.training.settings.config.PresetTable.configure`."""
