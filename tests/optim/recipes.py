"""Every recipe, and `GaLore` around optimizers that have none, ready to be built on the same groups."""

from __future__ import annotations

import functools
from collections.abc import Callable

import bitsandbytes
import pytest
import torch

from galore_torch import GaLore, GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreMuon, GaLoreSGD, QGaLoreAdamW8bit

RECIPES: dict[str, Callable[..., GaLore]] = {
    "GaLoreAdamW": functools.partial(GaLoreAdamW, lr=0.05, weight_decay=0.1, amsgrad=True),
    "GaLoreAdamW uncorrected": functools.partial(GaLoreAdamW, lr=0.05, correct_bias=False),
    "GaLoreAdamW8bit": functools.partial(GaLoreAdamW8bit, lr=0.05, weight_decay=0.1, min_8bit_size=16),
    "QGaLoreAdamW8bit": functools.partial(QGaLoreAdamW8bit, lr=0.05, weight_decay=0.1, min_8bit_size=16),
    "GaLoreAdafactor": functools.partial(GaLoreAdafactor, lr=0.05, scale_parameter=True),
    "GaLoreAdafactor relative": functools.partial(GaLoreAdafactor, weight_decay=0.1),
    "GaLoreMuon": functools.partial(GaLoreMuon, lr=0.05, weight_decay=0.1),
    "GaLoreSGD": functools.partial(GaLoreSGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "GaLore Muon": functools.partial(
        GaLore, optimizer_class=torch.optim.Muon, fallback_class=torch.optim.AdamW, lr=0.05, weight_decay=0.1
    ),
    "GaLore RMSprop": functools.partial(GaLore, optimizer_class=torch.optim.RMSprop, lr=0.01, centered=True),
    "GaLore Lion8bit": functools.partial(
        GaLore, optimizer_class=bitsandbytes.optim.Lion8bit, lr=0.01, min_8bit_size=16
    ),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
