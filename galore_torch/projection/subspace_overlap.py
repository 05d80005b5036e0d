"""How much of a subspace is left in the next: the overlap of two bases.

For orthonormal P and Q of rank r, ||P^T Q||_F^2 / r is the mean of cos^2 over the principal angles between their
subspaces (Golub and Van Loan, Matrix Computations, section 6.4.3). Single vectors are not compared: their signs and
their order are arbitrary, where two singular values lie close even their directions.

Shape suffixes: d the length of a mode, r the rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from galore_torch.projection.geometry import Basis


def overlap(new: Basis, old: Basis) -> Tensor:
    """The overlap of the subspaces of two bases, corrected for chance.

    Two random subspaces share r / d of each other; that counts as 0 here, and the same subspace as 1. Of several modes
    and of stacked matrices it is the mean.

    Args:
        new: factors (..., d, r) by mode, orthonormal in their columns, of any floating dtype; at least one.
        old: factors of the same names and shapes.

    Returns:
        A tensor of no dimensions on the factors' device, at least in float32: 1 for the same subspace, about 0 for
        random ones, at least -1 (two halves of the space that share nothing). A factor that spans all of its mode
        counts as 1.

    Example:
        >>> axes = torch.eye(4)
        >>> [round(float(overlap({"left": axes[:, :2]}, {"left": axes[:, i : i + 2]})), 3) for i in range(3)]
        [1.0, 0.0, -1.0]
    """
    return torch.stack([_of_factors(factor_dr, old[name]) for name, factor_dr in new.items()]).mean()


def _of_factors(new_dr: Tensor, old_dr: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(new_dr.dtype, old_dr.dtype), torch.float32)
    size, rank = new_dr.shape[-2:]
    if rank == size:
        return torch.ones((), dtype=dtype, device=new_dr.device)
    cosines_rr = new_dr.to(dtype).mT @ old_dr.to(dtype)
    return corrected_for_chance(cosines_rr.square().sum(dim=(-2, -1)).mean() / rank, rank, size)


def corrected_for_chance(shared: Tensor, rank: int, size: int) -> Tensor:
    """What two subspaces share, counted from what random ones do.

    Args:
        shared: the mean of cos^2 over the principal angles, of any shape.
        rank: of both subspaces, less than `size`.
        size: of the space.

    Returns:
        Of `shared`'s shape: 0 where it is what random subspaces share, 1 where it is 1.

    Example:
        >>> corrected_for_chance(torch.tensor(0.25), rank=1, size=4)
        tensor(0.)
    """
    chance = rank / size
    return (shared - chance) / (1 - chance)
