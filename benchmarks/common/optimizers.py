"""The optimizers that step the same weights: torch's, bitsandbytes', ours in its variants, and the published ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

RARELY = 10**9  # steps between renewals where none is wanted


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One optimizer."""

    build: Callable[..., Optimizer]  # makes it of weights; gets `rank`, `gap` and `stagger` too
    in_int8: bool = False  # whether the weights are kept in INT8
    # the published package that holds it, under a module name that ours has too; a key of `PEERS`
    peer: str | None = None
    ours: bool = False  # whether it is of this package


def _ours(weights: list[Tensor], rank: int, gap: int, stagger: bool, recipe: str = "GaLoreAdamW", **keys: Any) -> Any:
    import galore_torch

    group = {"params": weights, "rank": rank, "update_proj_gap": gap, "stagger": stagger, **keys}
    return getattr(galore_torch, recipe)([group], lr=1e-3)


def _adamw(weights: list[Tensor], **_: Any) -> Optimizer:
    return torch.optim.AdamW(weights, lr=1e-3, fused=True)


def _bitsandbytes(weights: list[Tensor], **_: Any) -> Any:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(weights, lr=1e-3)  # type: ignore[attr-defined, no-untyped-call]


def _galore_1(weights: list[Tensor], rank: int, gap: int, **_: Any) -> Optimizer:
    from galore_torch import GaLoreAdamW

    group = {"params": weights, "rank": rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW([group], lr=1e-3, no_deprecation_warning=True)


def _apollo(weights: list[Tensor], rank: int, gap: int, **_: Any) -> Any:
    from apollo_torch import APOLLOAdamW

    keys = {"rank": rank, "update_proj_gap": gap, "scale": 1, "proj": "random", "proj_type": "std"}
    return APOLLOAdamW([{"params": weights, **keys, "scale_type": "channel"}], lr=1e-3)


CONTENDERS: dict[str, Contender] = {
    "AdamW, fused": Contender(build=_adamw),
    "bitsandbytes AdamW8bit": Contender(build=_bitsandbytes),
    "GaLoreAdamW": Contender(build=_ours, ours=True),
    "GaLoreAdamW8bit": Contender(build=partial(_ours, recipe="GaLoreAdamW8bit"), ours=True),
    "GaLoreAdamW, bases in 8 bits": Contender(build=partial(_ours, basis_bits=8), ours=True),
    "GaLoreAdamW, INT8 weights": Contender(build=_ours, in_int8=True, ours=True),
    "galore-torch 1.0": Contender(build=_galore_1, peer="galore-torch-1.0"),
    "apollo-torch 1.0.3": Contender(build=_apollo, peer="apollo-torch-1.0.3"),
}
"""The published ones have the defaults of their READMEs."""


def weights_with_gradients(
    shapes: Iterable[tuple[int, int]],
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    *,
    in_int8: bool = False,
) -> list[Tensor]:
    """Return weights of these shapes, if asked for in INT8, with random gradients: the same at every call."""
    generator = torch.Generator(device).manual_seed(0)
    weights: list[Tensor] = []
    for number, shape in enumerate(shapes):
        drawn = (torch.randn(shape, generator=generator, device=device).mul_(scale) for scale in (0.02, 1e-3))
        weight, grad = (one.to(dtype) for one in drawn)
        if in_int8:
            from galore_torch.lowbit import QuantizedWeight

            weight = QuantizedWeight.of(weight, seed=number)
        weights.append(torch.nn.Parameter(weight))
        weights[-1].grad = grad
    return weights
