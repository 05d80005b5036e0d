"""Which weights are stepped together, and the coordinates that they have in that time."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from galore_torch.optim.work import Work

CHUNK_ELEMENTS = 2**23
"""Coordinates that are stepped together at least: enough to keep a device busy."""

CHUNK_SHARE = 1 / 16
"""Of all coordinates, how many may be stepped together: what exists of them in a step is then small beside the moments,
which hold each twice."""

ALIGNMENT = 64
"""Numbers; where coordinates of a weight begin in the memory that they share. Kernels load several at a time."""


def chunks(work: list[Work]) -> Iterator[list[Work]]:
    """Weights of one rule and device together, up to a share of all coordinates; all of a rule if it must be.

    Args:
        work: weights in any order.

    Yields:
        Some of them, each once.
    """
    most = max(CHUNK_ELEMENTS, int(CHUNK_SHARE * sum(one.coordinate_count for one in work)))
    kinds: dict[tuple[int, torch.device], list[Work]] = {}
    for one in work:
        kinds.setdefault((id(one.rule), one.weight.device), []).append(one)
    for alike in kinds.values():
        chunk: list[Work] = []
        elements = 0
        for one in alike:
            if chunk and one.traits.many_calls and elements + one.coordinate_count > most:
                yield chunk
                chunk, elements = [], 0
            chunk.append(one)
            elements += one.coordinate_count
        yield chunk


def coordinates_of(chunk: Sequence[Work], images: Sequence[Tensor]) -> list[Tensor | None]:
    """The coordinates of weights that are stepped together: zeros, in one piece of memory for each dtype.

    Args:
        chunk: the weights.
        images: what the rule gets as gradient of each.

    Returns:
        One tensor for each, of its image's shape; None where the rule moves the weight itself.
    """
    sizes: dict[torch.dtype, int] = {}
    starts = []
    for one, image in zip(chunk, images, strict=True):
        start = sizes.get(image.dtype, 0)
        starts.append(start)
        if one.through_coordinates:
            sizes[image.dtype] = start + -(-image.numel() // ALIGNMENT) * ALIGNMENT
    zeros = {dtype: torch.zeros(size, dtype=dtype, device=images[0].device) for dtype, size in sizes.items()}
    return [
        torch.as_strided(zeros[image.dtype], image.shape, _contiguous_strides(image.shape), start)
        if one.through_coordinates
        else None
        for one, image, start in zip(chunk, images, starts, strict=True)
    ]


@functools.cache
def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
