"""Projected gradients of every kind of projection, to be handled by the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from galore_torch import ProjectedGradient
from galore_torch.projection import Projection
from tests.optim.small import gradient

KINDS = {
    "left": Projection.of((12, 8), 3, "left"),
    "right": Projection.of((12, 8), 3, "right"),
    "full": Projection.of((12, 8), 3, "full"),
    "stack": Projection.of((4, 12, 8), 3, "left", "stack"),
    "tucker": Projection.of((8, 6, 3, 3), 3),
    "reshape": Projection.of((8, 6, 3, 3), 3, "left", "reshape"),
}


def basis_of(projection: Projection, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.linalg.qr(torch.randn(shape, generator=generator)).Q
        for name, shape in projection.factor_shapes.items()
    }


def projected(projection: Projection, step: int = 0) -> ProjectedGradient:
    full = gradient(torch.empty(projection.shape), step, 0)
    return ProjectedGradient.of(full, projection, basis_of(projection))
