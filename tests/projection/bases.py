"""What the tests of the projection share: orthonormal factors drawn at random, and matrices with a chosen spectrum."""

import torch
from torch import Tensor

from galore_torch.projection import Projection


def orthonormal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a random (..., d, r) with orthonormal columns."""
    return torch.linalg.qr(torch.randn(*shape, dtype=dtype)).Q.contiguous()


def random_basis(projection: Projection) -> dict[str, Tensor]:
    """Return random orthonormal factors for each mode, in float64."""
    return {name: orthonormal(*shape) for name, shape in projection.factor_shapes.items()}


def with_spectrum(rows: int, columns: int, values: Tensor) -> Tensor:
    """Return a random float64 matrix with the given min(rows, columns) singular values, falling."""
    left, right = orthonormal(rows, len(values)), orthonormal(columns, len(values))
    return left * values @ right.mT


def energy(matrix: Tensor, basis: dict[str, Tensor]) -> float:
    """Return the square of the norm of the projected matrix: on its left side, its right side, or both."""
    projected = matrix.double()
    if "left" in basis:
        projected = basis["left"].double().mT @ projected
    if "right" in basis:
        projected = projected @ basis["right"].double()
    return float(projected.square().sum())
