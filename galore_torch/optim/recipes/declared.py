"""Traits of optimizers that have no recipe and that a probe cannot find out, or only slowly."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from galore_torch.optim.moments import MOMENTS, Moment
from galore_torch.optim.rule import ADAPTED, DECLARED, ELEMENTWISE, Decay, Traits, UpdateContext
from galore_torch.optim.state_layout import KEPT_BY


def _muon_shape_ratio(moved: UpdateContext) -> float:
    """Muon's learning rate depends on the parameter's shape, and the coordinates' shape is not the weight's."""

    def adjusted(rows: int, columns: int) -> float:
        match moved.group.get("adjust_lr_fn"):
            case None | "original":
                return math.sqrt(max(1.0, rows / columns))
            case "match_rms_adamw":
                return math.sqrt(max(rows, columns))
        return 1.0

    return adjusted(*moved.weight.shape[:2]) / adjusted(*moved.coordinates_shape[:2])


def _is_large_and_divides(block: int, size: int) -> bool:
    """What torchao quantizes the state of."""
    return size >= 4096 and size % block == 0


ELEMENTWISE.update(f"{one.__module__}.{one.__qualname__}" for one in (torch.optim.Adam, torch.optim.AdamW))
DECLARED[f"{torch.optim.Muon.__module__}.Muon"] = Traits(decay="decoupled", factor=_muon_shape_ratio)


def _serve_single_weights(optimizer: torch.optim.Optimizer, weights: Mapping[int, Tensor]) -> None:
    """Applies bitsandbytes' settings of single weights (`GlobalOptimManager`) to their coordinates."""
    manager: Any = getattr(optimizer, "mng", None)
    plain: Any = getattr(optimizer, "get_config", None)
    if manager is None or plain is None:
        return

    def get_config(group_index: int, index: int, group: dict[str, Any]) -> dict[str, Any]:
        weight = weights.get(id(optimizer.param_groups[group_index]["params"][index]))
        by_place, by_weight = manager.index2config, manager.pid2config
        manager.index2config, manager.pid2config = {}, {}  # places are others here
        try:
            config: dict[str, Any] = plain(group_index, index, group)
        finally:
            manager.index2config, manager.pid2config = by_place, by_weight
        for module, name, own in manager.module_weight_config_triple:
            if getattr(module, name) is weight:
                config.update(own)
        return {**config, **by_weight.get(id(weight), {})}

    optimizer.get_config = get_config  # type: ignore[attr-defined]


ADAPTED["bitsandbytes"] = _serve_single_weights
# torchao's compile a kernel when first tried, which takes seconds.
_TORCHAO: dict[str, Decay] = {"AdamW": "decoupled", "Adam": "l2"}
_BLOCKS = {"8bit": 256, "4bit": 128, "Fp8": 256}
for _name, _decay in _TORCHAO.items():
    for _bits, _block in _BLOCKS.items():
        DECLARED[f"torchao.optim.adam.{_name}{_bits}"] = Traits(
            decay=_decay, holds_in_few_bits=functools.partial(_is_large_and_divides, _block)
        )

KEPT_BY += [
    ({"exp_avg", "exp_avg_sq"}, "AdamW (GaLoreAdamW)"),
    ({"state1", "state2"}, "bitsandbytes' AdamW (GaLoreAdamW8bit, QGaLoreAdamW8bit)"),
    ({"state1"}, "bitsandbytes' optimizers of one moment"),
    ({"row_var"}, "Adafactor (GaLoreAdafactor)"),
    ({"variance"}, "Adafactor (GaLoreAdafactor)"),
    ({"square_avg"}, "RMSprop"),
    ({"momentum_buffer"}, "SGD with momentum (GaLoreSGD)"),
]

MOMENTS.update(
    exp_avg=Moment(1),
    momentum_buffer=Moment(1),
    momentum=Moment(1),
    exp_avg_sq=Moment(2, mean="exp_avg"),
    max_exp_avg_sq=Moment(2, mean="exp_avg"),
    square_avg=Moment(2),
    row_var=Moment(2),
    col_var=Moment(2),
    variance=Moment(2),
)
