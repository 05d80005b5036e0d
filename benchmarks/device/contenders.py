"""The optimizers that step the same weights: torch's, bitsandbytes', ours in its variants, and the published ones.

It is imported by the child processes of the published ones too, in which `galore_torch` is theirs, not ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

RARELY = 10**9  # steps between renewals where none is wanted


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One optimizer.

    Attributes:
        build: Makes it of weights and a rank.
        in_int8: Whether the weights are kept in INT8.
        peer: The folder that holds it, if it is a published one under a module name that ours has too.
    """

    build: Callable[[list[Tensor], int], Optimizer]
    in_int8: bool = False
    peer: str | None = None


def _ours(recipe: str, **keys: Any) -> Callable[[list[Tensor], int], Optimizer]:
    def build(weights: list[Tensor], rank: int) -> Optimizer:
        import galore_torch

        group = {"params": weights, "rank": rank, "update_proj_gap": RARELY, "stagger": False, **keys}
        made: Optimizer = getattr(galore_torch, recipe)([group], lr=1e-3)
        return made

    return build


def _adamw(weights: list[Tensor], _: int) -> Optimizer:
    return torch.optim.AdamW(weights, lr=1e-3, fused=True)


def _bitsandbytes(weights: list[Tensor], _: int) -> Optimizer:
    import bitsandbytes

    made: Optimizer = bitsandbytes.optim.AdamW8bit(weights, lr=1e-3)  # type: ignore[attr-defined, no-untyped-call]
    return made


def _galore_1(weights: list[Tensor], rank: int) -> Optimizer:
    from galore_torch import GaLoreAdamW

    group = {"params": weights, "rank": rank, "update_proj_gap": RARELY, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW([group], lr=1e-3, no_deprecation_warning=True)


def _apollo(weights: list[Tensor], rank: int) -> Optimizer:
    from apollo_torch import APOLLOAdamW

    group = {"params": weights, "rank": rank, "update_proj_gap": RARELY, "scale": 1}
    made: Optimizer = APOLLOAdamW([{**group, "proj": "random", "proj_type": "std", "scale_type": "channel"}], lr=1e-3)
    return made


CONTENDERS: dict[str, Contender] = {
    "AdamW, fused": Contender(build=_adamw),
    "bitsandbytes AdamW8bit": Contender(build=_bitsandbytes),
    "GaLoreAdamW": Contender(build=_ours("GaLoreAdamW")),
    "GaLoreAdamW8bit": Contender(build=_ours("GaLoreAdamW8bit")),
    "GaLoreAdamW, bases in 8 bits": Contender(build=_ours("GaLoreAdamW", basis_bits=8)),
    "GaLoreAdamW, INT8 weights": Contender(build=_ours("GaLoreAdamW"), in_int8=True),
    "galore-torch 1.0": Contender(build=_galore_1, peer="galore-torch-1.0"),
    "apollo-torch 1.0.3": Contender(build=_apollo, peer="apollo-torch-1.0.3"),
}
OURS = ("GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreAdamW, bases in 8 bits", "GaLoreAdamW, INT8 weights")


def weights_with_gradients(shapes: list[tuple[int, int]], device: str, *, in_int8: bool = False) -> list[Tensor]:
    """Weights in bf16 with random gradients.

    Args:
        shapes: Of the weights.
        device: Where.
        in_int8: Whether to keep the weights in INT8.
    """
    weights: list[Tensor] = []
    for number, shape in enumerate(shapes):
        weight = torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(0.02)
        if in_int8:
            from galore_torch.lowbit import QuantizedWeight

            weight = QuantizedWeight.of(weight, seed=number)
        weights.append(torch.nn.Parameter(weight))
        weights[-1].grad = torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(1e-3)
    return weights
