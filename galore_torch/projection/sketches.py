"""A matrix as a decomposition sees it: from one side, in the precision of its products, or random combinations of it.

Shape suffixes: d x k the matrix seen from the side in question, l the columns of a sketch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from galore_torch import devices
from galore_torch.projection.orthonormal import exact_products
from galore_torch.random_bits import bell_curve, key_of, random_bits

OVERSAMPLING = 16
"""Extra directions that a subspace iteration carries along, and a sketch. docs/decisions.md has the measured energies:
with fewer some layers lose more than 1 % of what the exact basis captures."""


def sketch_columns(shape: Sequence[int], rank: int) -> int:
    """How many columns it takes to find a basis.

    Args:
        shape: of the matrix.
        rank: columns that the basis is to have.
    """
    return min(rank + OVERSAMPLING, *shape)


def sketches(matrix: Tensor, ranks: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """All that the decomposition `sketched` reads of a matrix: random combinations of its columns, and of its rows.

    They are linear in the matrix: those of an average are the averages. The matrices of a stack have the same ones.

    Args:
        matrix: (..., m, n), of any floating dtype.
        ranks: the number of columns that a basis is to have, by side.
        seed: of the random numbers, which are the same on every device.

    Returns:
        By side Y = A Omega, (..., d, l), whose entries are about as large as A's; in float32 at least.
    """
    found = {}
    for number, (side, rank) in enumerate(ranks.items()):
        facing_dk = seen_from(exact(matrix), side)
        one_kd = facing_dk.mT[(0,) * (matrix.dim() - 2)]
        drawn_kl = random_columns(one_kd, sketch_columns(one_kd.shape, rank), seed, number) / one_kd.shape[0] ** 0.5
        with exact_products():
            found[side] = facing_dk @ drawn_kl
    return found


def seen_from(matrix: Tensor, side: str) -> Tensor:
    """The matrix seen from a side: its columns are what the side's basis spans.

    Args:
        matrix: (..., m, n).
        side: `left` or `right`.

    Returns:
        (..., d, k): the matrix, or its transpose.
    """
    return matrix if side == "left" else matrix.mT


def random_columns(facing_dk: Tensor, columns: int, seed: int, number: int) -> Tensor:
    """Columns of independent random numbers, others for each number.

    Args:
        facing_dk: (..., d, k), whose columns they are like.
        columns: how many.
        seed: of the numbers, which are the same on every device.
        number: which columns of that seed.

    Returns:
        (..., d, columns), in float32 at least.
    """
    shape, device = (*facing_dk.shape[:-1], columns), facing_dk.device
    key = torch.full((), key_of(seed, number), dtype=torch.int32, device=device)
    places = torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device=device).view(shape)
    return bell_curve(random_bits(places, key)).to(torch.promote_types(facing_dk.dtype, torch.float32))


def multiplied(matrix: Tensor) -> Tensor:
    """The matrix as it is multiplied.

    bf16 as it is, where the device has instructions for it: it loses no energy and takes a third of the time. fp16 has
    too short a range.

    Args:
        matrix: of any floating dtype.
    """
    stays = matrix.dtype == torch.bfloat16 and devices.multiplies_bfloat16(matrix)
    return matrix if stays else exact(matrix)


def exact(matrix: Tensor) -> Tensor:
    """The matrix in the precision of the computation.

    Args:
        matrix: of any floating dtype.
    """
    return matrix if matrix.dtype == torch.float64 else matrix.float()
