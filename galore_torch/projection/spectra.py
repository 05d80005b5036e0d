"""How much of a gradient lies in how few dimensions, and how much of it a given subspace holds.

The energy of a gradient is ||G||_F^2, the sum of its squared singular values. All here but `captured_energy` follows
from the Gram matrix of the gradient's shorter side, in float64: its eigenvalues are the squared singular values, its
eigenvectors the basis that GaLore's ``std`` would use at any rank, and the share of another gradient that this basis
holds is a diagonal (Golub and Van Loan, Matrix Computations, section 8.6.1). So one eigendecomposition of the shorter
side is enough for all ranks. Squaring leaves singular values below 1e-8 of the largest to rounding; no energy of any
weight lies there.

Shape suffixes: m, n rows and columns of a gradient; k the shorter of both; r the rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from galore_torch.projection.geometry import Basis, Projection


def captured_energy(projection: Projection, grad: Tensor, basis: Basis) -> Tensor:
    """The share of a gradient's energy that a basis holds: ||project(G)||_F^2 / ||G||_F^2.

    Args:
        projection: how the weight is projected.
        grad: a gradient of the weight's shape, of any floating dtype.
        basis: the factors, of `grad`'s device.

    Returns:
        A tensor of no dimensions, at least in float32, from 0 to 1; not a number of a gradient of zeros.

    Example:
        >>> projection = Projection.of((4, 4), rank=1, proj_type="left")
        >>> basis = {"left": torch.eye(4)[:, 1:2]}
        >>> round(float(captured_energy(projection, torch.diag(torch.tensor([3.0, 4.0, 0, 0])), basis)), 4)
        0.64
    """
    projected = projection.project(grad, {name: factor.to(grad.dtype) for name, factor in basis.items()})
    dtype = torch.promote_types(grad.dtype, torch.float32)
    inside, whole = (torch.linalg.vector_norm(one, dtype=dtype) for one in (projected, grad))
    share: Tensor = (inside / whole).square()
    return share


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The directions of a gradient's shorter side, the strongest first; of several gradients stacked, of each.

    Attributes:
        energies: squared singular values (..., k), in descending order, float64.
        directions: the singular vectors (..., k, k) of the shorter side in its columns, float64.
    """

    energies: Tensor
    directions: Tensor

    @classmethod
    def of(cls, gram_kk: Tensor) -> Spectrum:
        """The spectrum behind Gram matrices.

        Args:
            gram_kk: (..., k, k), from `gram`.

        Returns:
            The spectrum of each.
        """
        energies, directions = torch.linalg.eigh(gram_kk)
        return cls(energies=energies.flip(-1).clamp(min=0), directions=directions.flip(-1))

    @property
    def stable_rank(self) -> Tensor:
        """||G||_F^2 / ||G||_2^2, (...): 1 if there is one direction, k if all are as strong."""
        return self.energies.sum(-1) / self.energies[..., 0]

    @property
    def held(self) -> Tensor:
        """The share of the energy in the strongest r directions, (..., k): for r = 1 to k."""
        return self.energies.cumsum(-1) / self.energies.sum(-1, keepdim=True)

    def holds(self, gram_kk: Tensor) -> Tensor:
        """The share of another gradient's energy in the strongest r directions of this one.

        Args:
            gram_kk: the other's Gram matrix (..., k, k).

        Returns:
            (..., k): for r = 1 to k. The last is 1.
        """
        along = (self.directions * (gram_kk @ self.directions)).sum(-2)
        return along.cumsum(-1) / along.sum(-1, keepdim=True)

    def basis(self, rank: int) -> dict[str, Tensor]:
        """The strongest directions as a basis.

        Args:
            rank: how many, from 1 to k.

        Returns:
            One factor (..., k, r), under the name ``left``.
        """
        return {"left": self.directions[..., :rank]}


def gram(grad: Tensor) -> Tensor:
    """The Gram matrix of a gradient's shorter side.

    Args:
        grad: (..., m, n), of any floating dtype.

    Returns:
        G G^T, or G^T G where m > n: (..., k, k), float64.

    Example:
        >>> gram(torch.tensor([[3.0, 4.0]]))
        tensor([[25.]], dtype=torch.float64)
    """
    grad = grad.to(torch.float64)
    return grad.mT @ grad if grad.shape[-2] > grad.shape[-1] else grad @ grad.mT


def rank_that_holds(held: Tensor, share: float) -> int:
    """The least rank that holds a share of the energy.

    Args:
        held: shares for r = 1 to k, not falling, as `Spectrum.held` gives them: (k,).
        share: what is wanted, from 0 to 1.

    Returns:
        The rank, from 1 to k.

    Example:
        >>> rank_that_holds(torch.tensor([0.5, 0.8, 0.95, 1.0]), 0.9)
        3
    """
    return min(int((held < share - 1e-12).sum()) + 1, held.numel())
