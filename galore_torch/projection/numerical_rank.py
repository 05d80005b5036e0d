"""Which directions of a basis its gradient determines, and what takes the place of the others.

A gradient of fewer tokens than the rank, or an expert's that met none, has fewer directions than a basis has columns;
a decomposition fills up with whatever rounding leaves. Such columns are noise: the old basis' directions stay in
their place, and where there is no old one a column of zeros, which projects to nothing, until a gradient determines
more.

Shape suffixes: d x k the matrix seen from the side of the basis, r the rank, q the columns of another basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from galore_torch.projection.geometry import Basis
from galore_torch.projection.orthonormal import above_zero, cholesky_qr, exact_products, leading_directions

LEAST_SINE = 0.1
"""The sine of the angle between an old direction and the new ones from which on it is one more direction. Rounding a
basis to bfloat16 turns its columns by less."""

TURNS = 12
"""Newton-Schulz steps that turn directions to others, and then those that are orthogonal to all others."""


def are_determined(lengths_r: Tensor, shape: Sequence[int], rounded_to: torch.dtype) -> Tensor:
    """Which columns of a basis stand for more of a matrix than its rounding.

    Args:
        lengths_r: (..., r), how long the matrix is on each, up to a common factor: as singular values are.
        shape: of the matrix.
        rounded_to: the dtype that the matrix had.

    Returns:
        (..., r), of booleans; all False for a matrix of zeros.
    """
    # Rounding each of m x n numbers on its own leaves singular values of eps (sqrt(m) + sqrt(n)) / sqrt(m n) of the
    # norm at most, and so many eps of the computation are lost in finding the directions themselves.
    rounding = 2 * torch.finfo(rounded_to).eps * sum(size**-0.5 for size in shape)
    least = rounding + 64 * torch.finfo(lengths_r.dtype).eps
    lengths_r = lengths_r / above_zero(lengths_r.amax(-1, keepdim=True))  # squares of tiny and huge ones are in range
    determined: Tensor = lengths_r > least * torch.linalg.vector_norm(lengths_r, dim=-1, keepdim=True)
    return determined


def is_lacking(basis_dr: Tensor) -> Tensor:
    """Which columns of a basis are zeros: no gradient has determined them yet.

    Args:
        basis_dr: (..., d, r), also as it comes back from few bits.

    Returns:
        (..., r), of booleans.
    """
    zero: Tensor = torch.linalg.vector_norm(basis_dr, dim=-2) < 0.5
    return zero


def lacking(basis: Basis) -> tuple[int, bool]:
    """How many columns of a basis no gradient has determined yet. Synchronizes.

    Args:
        basis: factors by mode.

    Returns:
        The number over all factors, and whether any matrix of any factor has none but such.
    """
    missing, lack_all = count_lacking(basis).tolist()
    return missing, lack_all > 0


def count_lacking(basis: Basis) -> Tensor:
    """What `lacking` reads back.

    Args:
        basis: factors by mode.

    Returns:
        (2,), of whole numbers: columns that no gradient has determined yet, and matrices that have none but such.
    """
    missing = [is_lacking(factor) for factor in basis.values()]
    return torch.stack([torch.stack((one.sum(), one.all(-1).sum())) for one in missing]).sum(0)


@dataclass(frozen=True)
class Directions:
    """What a decomposition has found of one side of a matrix.

    Attributes:
        columns_dr: (..., d, r), orthonormal.
        told_r: (..., r), which of them the matrix determines, as `are_determined` says.
    """

    columns_dr: Tensor
    told_r: Tensor


def keep_determined(found: Directions, old_dr: Tensor | None) -> Tensor:
    """A basis of the directions that are determined, and beside them what it can keep of the old one. Synchronizes.

    Args:
        found: the directions.
        old_dr: (..., d, r), the basis in use until now, of their dtype; None at first.

    Returns:
        (..., d, r): of each matrix first the determined columns, then as many directions of the old basis that are
        orthogonal to them as there is room for, then zeros. Where none is determined, the old basis as it is.
    """
    return found.columns_dr if bool(found.told_r.all()) else keep_unread(found, old_dr, completes=True)[0]


def keep_unread(found: Directions, old_dr: Tensor | None, *, completes: bool) -> tuple[Tensor, Tensor]:
    """What `keep_determined` gives, and nothing is read back.

    Args:
        found: the directions.
        old_dr: (..., d, r), the basis in use until now, of their dtype; None at first.
        completes: whether the old basis' directions are put beside what a matrix tells of its own. Without that a basis
            is the one or the other, for less work.

    Returns:
        The basis (..., d, r), and whether some matrix tells some of its directions and not all, beside an old basis: a
        boolean of no dimensions.
    """
    told_r = found.told_r
    if old_dr is None:
        return determined_first(found), torch.zeros((), dtype=torch.bool, device=told_r.device)
    some = told_r.any(-1)
    columns_dr = complete(found, old_dr) if completes else found.columns_dr
    basis = torch.where(some[..., None, None], columns_dr, old_dr)
    return basis, (some & ~told_r.all(-1)).any()


def complete(found: Directions, old_dr: Tensor) -> Tensor:
    """The determined columns, and then directions of the old basis that are orthogonal to them.

    In the order of columns the first are the strongest, so the first that are replaced. The others are turned to the
    old one's last columns, nearly as far as an orthogonal Procrustes problem asks for: moments keep their meaning as
    far as columns keep their place.

    Args:
        found: the directions.
        old_dr: (..., d, r), of their dtype, orthonormal but for columns of zeros.

    Returns:
        (..., d, r), orthonormal but for columns of zeros, which come last.
    """
    with exact_products():
        is_there_r = ~is_lacking(old_dr)
        told_dr, old_dr = determined_first(found), determined_first(Directions(old_dr, is_there_r))
        told, there = (one.sum(-1, keepdim=True) for one in (found.told_r, is_there_r))
        rank = old_dr.shape[-1]
        outside_dr = old_dr - told_dr @ (told_dr.mT @ old_dr)
        outside_dr = outside_dr @ leading_directions(old_dr, outside_dr, outside_dr, rank)  # the longest first
        places_r = torch.arange(rank, device=old_dr.device)
        kept_r = (torch.linalg.vector_norm(outside_dr, dim=-2) > LEAST_SINE) & (places_r < rank - told)
        outside_dr = cholesky_qr(determined_first(Directions(outside_dr, kept_r)))
        # Their places are those after the determined ones, as they are in the old basis those before its end.
        kept, places_r = kept_r.sum(-1, keepdim=True), places_r - told
        outside_dr = outside_dr.take_along_dim((places_r % rank).unsqueeze(-2), dim=-1)
        nearest_dr = old_dr.take_along_dim(((places_r + there - kept) % rank).unsqueeze(-2), dim=-1)
        filled_r = (places_r >= 0) & (places_r < kept)
        turn_rr = torch.where(filled_r.unsqueeze(-2), outside_dr.mT @ nearest_dr, 0)
        turn_rr = _orthogonal(turn_rr)
        # What is orthogonal to all others goes where it is nearest, and moves none of those that are not.
        filled_rr = torch.diag_embed(filled_r.to(turn_rr.dtype))
        turn_rr = _orthogonal(turn_rr + (filled_rr - turn_rr @ turn_rr.mT) @ (filled_rr - turn_rr.mT @ turn_rr))
        return told_dr + cholesky_qr(outside_dr @ turn_rr)


def _orthogonal(turn_rr: Tensor) -> Tensor:
    """The nearest orthogonal matrix, of singular values from 0 to 1; those that are nearly 0 stay small."""
    for _ in range(TURNS):
        turn_rr = 1.5 * turn_rr - 0.5 * turn_rr @ (turn_rr.mT @ turn_rr)
    return turn_rr


def determined_first(found: Directions) -> Tensor:
    """The determined columns of each matrix, and zeros in the place of the others.

    Args:
        found: the directions.

    Returns:
        (..., d, r).
    """
    order_r = (~found.told_r).to(torch.uint8).argsort(dim=-1, stable=True)
    kept = torch.where(found.told_r.unsqueeze(-2), found.columns_dr, 0)
    return kept.take_along_dim(order_r.unsqueeze(-2), dim=-1)
