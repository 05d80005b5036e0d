"""Sums of squares along axes of a tensor, in one pass and without a copy of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**18
"""Squares that exist at a time on a CPU: they stay in its cache."""


def exact(tensor: Tensor) -> torch.dtype:
    """In which norms of a tensor are held: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def sums_of_squares(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """The sums of the squares along axes.

    On a CPU torch's norm takes ten times as long across rows as along them, and copies 16 bits into 32; there they are
    summed in blocks of rows. A sum of 16 bits is then right to their last digit.

    Args:
        tensor: of any floating dtype.
        axes: counted from the end.

    Returns:
        In `exact` of the dtype, with axes of length 1 in the place of those that were summed.
    """
    dtype = exact(tensor)
    on_cpu = tensor.device.type == "cpu" and tensor.dtype is not torch.float16  # whose squares vanish
    if on_cpu and tuple(axes) == (-2,):
        rows = max(1, BLOCK_ELEMENTS // max(1, tensor.numel() // max(1, tensor.shape[-2])))
        sums = [(part * part).sum(-2, keepdim=True) for part in torch.split(tensor, rows, -2)]
        return sums[0].to(dtype) if len(sums) == 1 else torch.cat(sums, -2).sum(-2, keepdim=True, dtype=dtype)
    norms: Tensor = torch.linalg.vector_norm(
        tensor, dim=tuple(axes), keepdim=True, dtype=None if on_cpu and tuple(axes) == (-1,) else dtype
    )
    return norms.to(dtype).square_()
