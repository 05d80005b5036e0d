"""Presets: the paper's models with the paper's recipe (arXiv 2403.03507, section 5), and the demo's."""

from collections.abc import Mapping
from typing import Any

from galore_torch.training.pretrain.config import SIZES, PretrainConfig
from galore_torch.training.settings.config import FULL_RANK, PROJECTED, PresetTable, what_trains

DEFAULT_PRESET = "llama-tiny"
CONTINUED = "continued"
"""The preset of a training that goes on from a model, of whatever sizes."""

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
    CONTINUED: {
        "rank": 64, "scale": 1.0, "seq": 512, "steps": 1000, "batch": 16, "micro_batch": 4, "dtype": "float32",
        "eval_tokens": 200_000, "eval_every": 200, "save_every": 200,
    },
}  # fmt: skip
"""Settings of each preset by name. What a preset leaves out has the setting's own default."""

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
_MUON_LR = {"galore-muon": {"lr": 0.008, "others_lr": 0.01}}  # of llama-tiny, and what others have with the rest
_PAPER_LR = {PROJECTED: {"lr": 0.01}, **_MUON_LR, **_BASELINES_LR}

LEARNING_RATES: dict[str, dict[str, dict[str, float]]] = {
    # Tuned at the demo's length, ReLoRA's after LoRA's; docs/decisions.md has the table.
    "llama-tiny": {
        PROJECTED: {"lr": 0.01, "others_lr": 0.04},
        FULL_RANK: {"lr": 0.001, "others_lr": 0.04},
        "galore-muon": {"lr": 0.008, "others_lr": 0.08},  # docs/study.md
        "low-rank": {"lr": 0.001, "others_lr": 0.04},
        "lora": {"lr": 0.0025, "others_lr": 0.04},
        "relora": {"lr": 0.00125, "others_lr": 0.04},
    },
    **dict.fromkeys(("llama-60m", "llama-130m", "llama-350m", "llama-1b"), _PAPER_LR),
    "llama-7b": {PROJECTED: {"lr": 0.005}, **_MUON_LR, **_BASELINES_LR},
    # Between those that were best for SmolLM2-135M on docstrings and half of them; docs/results.md has the figures.
    CONTINUED: {
        PROJECTED: {"lr": 6e-4, "others_lr": 1e-4},
        FULL_RANK: {"lr": 1e-4},
        "galore-muon": {"lr": 1e-4},  # AdamW's, by convention (arXiv 2502.16982)
        "low-rank": {"lr": 1e-3},
        "lora": {"lr": 5e-4},
        "relora": {"lr": 5e-4},
    },
}
"""Peak learning rates of each preset, for optimizers that project, for those that do not, and for adapters by name.

The paper tunes its baselines over 1e-2 to 1e-4 and does not tell the winners: 1e-3 is a place to start from. LoRA,
whose product begins at zero and counts a fraction, wants more.
"""


def _besides(preset: str, optim: str, given: Mapping[str, Any]) -> dict[str, Any]:
    by_optimizer = BY_OPTIMIZER.get(preset, {})
    # Where another model is named, a preset's sizes are of one that is not trained.
    sizes = dict.fromkeys(SIZES) if given.get("model") or given.get("config_of") else {}
    return {**by_optimizer.get(what_trains(optim, "none"), {}), **by_optimizer.get(optim, {}), **sizes}


def _default(given: Mapping[str, Any]) -> str:
    return CONTINUED if given.get("model") else DEFAULT_PRESET


PRESET_TABLE = PresetTable(
    config=PretrainConfig, presets=PRESETS, default=_default, besides=_besides, rates=LEARNING_RATES
)
configure = PRESET_TABLE.configure
"""Makes the configuration of a pre-training; see `galore_torch.training.settings.config.PresetTable.configure`."""
