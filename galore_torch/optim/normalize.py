"""Updates of fixed size: every column normalized, or the whole orthogonalized, at once or in blocks.

Entries of a normalized update have a root mean square of 1, so that learning rate and `scale` alone say how far a
weight moves, as with Adam. Columns (SCALE, arXiv 2506.16659): each input's, over outputs, whichever side is projected.
Orthogonal (Muon): a Newton-Schulz iteration, times sqrt(max(m, n)) (arXiv 2502.16982). What lies in the subspace
alone is orthogonalized there (SUMO, arXiv 2505.24749), for bases are orthonormal. Blocks: the same of about twice as
many outputs at a time as the rank is, so that m n r operations take the place of m^2 n, in memory of a block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from galore_torch import devices
from galore_torch.optim.norms import exact, sums_of_squares
from galore_torch.optim.update import Update
from galore_torch.projection import Projection

ODD = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5 in a Newton-Schulz step, for singular values: Muon's, which bring all from 0.002 to 1 near 1 in
five steps. With two or three, of polynomials of their own, a model learns less (docs/study.md)."""

NEWTON_SCHULZ_STEPS = 5

EPS = 1e-7

BLOCK_RANKS = 2
"""Ranks of outputs in a block. Blocks of one learn less, and of two cost a tenth of a training step (docs/study.md)."""


def normalized(update: Update, kind: str) -> Update:
    """An update of the same direction, in the sense of `kind`, and of fixed size.

    Args:
        update: of one weight; what it holds may be changed in place.
        kind: `columns`, `orthogonal` or `blocks`.

    Returns:
        The normalized update.
    """
    if update.full is None and not update.projection.is_tucker and len(update.projection.modes):
        return (_columns_inside if kind == "columns" else _orthogonal_inside)(update)
    full = update.formed().view(update.projection.view_shape)
    if kind == "columns":
        outputs = _outputs(update.projection)
        return Update(
            update.projection, full=full, scales=_to_one(sums_of_squares(full, [outputs]), full.shape[outputs])
        )
    matrices = full.flatten(1) if _is_tensor(update.projection) else full
    outputs, ranks = matrices.shape[-2], [mode.rank for mode in update.projection.modes]
    blocks = _count(outputs, BLOCK_RANKS * min(ranks, default=outputs)) if kind == "blocks" else 1
    for block in torch.tensor_split(matrices, blocks, -2) if outputs % blocks else (_in_blocks(matrices, blocks),):
        block.copy_(_orthogonal(block).mul_(math.sqrt(max(block.shape[-2:]))))
    return Update(update.projection, full=matrices.view(full.shape))


def _count(outputs: int, size: int) -> int:
    """How many blocks of about `size` outputs: such that all are alike, if that is no more than half as many again."""
    least = -(-outputs // size)
    return next((count for count in range(least, least + least // 2 + 1) if outputs % count == 0), least)


def _in_blocks(matrices: Tensor, blocks: int) -> Tensor:
    *stack, rows, columns = matrices.shape
    return matrices.view(*stack, blocks, rows // blocks, columns) if blocks > 1 else matrices


def _is_tensor(projection: Projection) -> bool:
    """Whether a weight's first axis counts its outputs and all others its inputs, as a convolution's do."""
    return len(projection.view_shape) > 2 and (projection.is_tucker or not projection.modes)


def _outputs(projection: Projection) -> int:
    """The axis of outputs, counted from the end."""
    return -len(projection.view_shape) if _is_tensor(projection) else -2


def _root_of_longer(projection: Projection) -> float:
    rows, columns = projection.view_shape[-2:]
    if _is_tensor(projection):
        rows, columns = projection.view_shape[0], math.prod(projection.view_shape[1:])
    return math.sqrt(max(rows, columns))


def _to_one(squares: Tensor, count: int) -> Tensor:
    """Factors that give slices of so many entries, of these sums of squares, a root mean square of 1; 0 for zeros."""
    return torch.where(squares > 0, count / squares, 0).sqrt_()


def _columns_inside(update: Update) -> Update:
    """Columns of P c, c Q^T or P c Q^T from the coordinates alone: those of c, or the lengths of Q's rows under c."""
    coordinates, rows = update.coordinates, update.projection.view_shape[-2]
    assert coordinates is not None
    right = update.factors.get("right")
    if right is None:
        scales = _to_one(sums_of_squares(coordinates, [-2]), rows)
        return Update(update.projection, coordinates.mul_(scales.to(coordinates.dtype)), update.factors)
    wide = right.to(exact(right))
    gram = (coordinates.mT @ coordinates).to(wide.dtype)
    scales = _to_one(((wide @ gram) * wide).sum(-1, keepdim=True).clamp_min_(0), rows)
    return Update(update.projection, coordinates, {**update.factors, "right": (wide * scales).to(right.dtype)})


def _orthogonal_inside(update: Update) -> Update:
    assert update.coordinates is not None
    made = _orthogonal(update.coordinates).mul_(_root_of_longer(update.projection))
    return Update(update.projection, made, update.factors)


def _orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, about: singular values are from 0.7 to 1.2.

    Args:
        matrices: (..., m, n).

    Returns:
        Of the same shape and dtype, computed in bfloat16 where the device is fast in that; float64 stays float64.
    """
    in_bf16 = matrices.dtype != torch.float64 and devices.multiplies_bfloat16(matrices)
    flat = matrices.to(torch.bfloat16 if in_bf16 else exact(matrices)).reshape(-1, *matrices.shape[-2:])
    # A GPU takes all at once, for launches cost more there than caches win.
    parts = [flat] if devices.runs_ahead(flat) else torch.split(flat, 1)
    made = torch.cat([_newton_schulz(part) for part in parts])
    return made.view(matrices.shape).to(matrices.dtype)


def _newton_schulz(stack: Tensor) -> Tensor:
    """Of each matrix X of a stack a X + b X X^T X + c (X X^T)^2 X in the place of X, some times."""
    is_tall = stack.shape[-2] > stack.shape[-1]
    wide = stack.mT if is_tall else stack
    wide = wide / torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True).clamp_min(EPS)
    a, b, c = ODD
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if is_tall else wide
