"""Steps weights in chunks: which are stepped together, and the coordinates that they have in that time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from galore_torch.optim.folding import common_factors, fold
from galore_torch.optim.inner_group import GroupWrites, moves_at_rate_one
from galore_torch.optim.nonfinite import count_nonfinite
from galore_torch.optim.slices import inner_params, keep_inner_state
from galore_torch.optim.state_keys import STEP
from galore_torch.optim.trained_weight import TrainedWeight
from galore_torch.projection import devices

CHUNK_ELEMENTS = 2**23
"""Coordinates that are stepped together at least: enough to keep a CPU busy."""

GPU_CHUNKS = 4
"""How many times as many on a GPU: a chunk costs the host half a millisecond there, however small it is."""

CHUNK_SHARE = 1 / 16
"""Of all coordinates, how many may be stepped together: what exists of them in a step is then small beside the moments,
which hold each twice."""

ALIGNMENT = 64
"""Numbers; where coordinates of a weight begin in the memory that they share. Kernels load several at a time."""


def most_together(coordinates: int, weight: Tensor) -> int:
    """How many coordinates may exist at a time.

    Args:
        coordinates: of all weights of an optimizer.
        weight: one of those that are on its device.

    Returns:
        A number of elements.
    """
    least = CHUNK_ELEMENTS * (GPU_CHUNKS if devices.runs_ahead(weight) else 1)
    return max(least, int(CHUNK_SHARE * coordinates))


def chunks(trained: Sequence[TrainedWeight], coordinates: int) -> Iterator[list[TrainedWeight]]:
    """Weights of one rule and device together, up to `most_together` coordinates; all of a rule if it must be.

    Args:
        trained: weights in any order.
        coordinates: of all weights of the optimizer.

    Yields:
        Some of them, each once.
    """
    kinds: dict[tuple[int, torch.device], list[TrainedWeight]] = {}
    for one in trained:
        kinds.setdefault((id(one.rule), one.weight.device), []).append(one)
    for alike in kinds.values():
        chunk: list[TrainedWeight] = []
        elements, most = 0, most_together(coordinates, alike[0].weight)
        for one in alike:
            if chunk and one.traits.many_calls and elements + one.coordinate_count > most:
                yield chunk
                chunk, elements = [], 0
            chunk.append(one)
            elements += one.coordinate_count
        yield chunk


def step_chunk(
    chunk: list[TrainedWeight],
    written: GroupWrites,
    agree: Callable[[Tensor], Tensor],
    *,
    skip_nonfinite: bool,
) -> None:
    """Moves the coordinates (or the parameters) of a chunk by the optimizer inside, and folds them into the weights.

    Args:
        chunk: weights with a gradient, of one rule and device.
        written: takes what the optimizer inside writes into its groups.
        agree: makes the largest entries of gradients the same in all processes that have shards of them.
        skip_nonfinite: leave out weights whose gradient is not finite.
    """
    chunk, grads = _with_gradients(chunk, agree, skip_nonfinite=skip_nonfinite)
    if not chunk:
        return
    coordinates = _coordinates_of(chunk, grads)
    versions = [grad._version for grad in grads]
    params = [inner_params(*given) for given in zip(chunk, grads, coordinates, strict=True)]
    wrote = chunk[0].rule.step([part for _, parts in params for part in parts])
    for key, one in {id(one.inner_group): one for one in chunk}.items():
        written.note(one.group, wrote[key])
    for one, (_, parts) in zip(chunk, params, strict=True):
        keep_inner_state(one, parts)
    fold_all(chunk, grads, versions, [tensor for tensor, _ in params])


def fold_all(
    chunk: Sequence[TrainedWeight], grads: Sequence[Tensor], versions: Sequence[int], moved: Sequence[Tensor]
) -> None:
    """Puts what the optimizer inside has moved back into the weights.

    Args:
        chunk: weights of one rule.
        grads: what the optimizer inside got as their gradients.
        versions: of those, before it moved anything.
        moved: coordinates, or the weights themselves where they are not projected.
    """
    groups = {id(one.inner_group): one for one in chunk}
    factors = {key: common_factors(one) for key, one in groups.items()}
    for one, grad, version, tensor in zip(chunk, grads, versions, moved, strict=True):
        common = factors[id(one.inner_group)]
        if not one.through_coordinates:
            one.given_back(tensor)
        elif common is not None and one.is_plain:
            one.state[STEP] += 1
            one.fold(tensor, alpha=common[0], beta=common[1])
        else:
            is_changed = grad._version != version and moves_at_rate_one(one.group)  # some rules write into gradients
            fold(one, one.given_back(tensor), one.inner_grad() if is_changed else grad)
        one.drop_factors()


def _with_gradients(
    chunk: list[TrainedWeight], agree: Callable[[Tensor], Tensor], *, skip_nonfinite: bool
) -> tuple[list[TrainedWeight], list[Tensor]]:
    """The weights that are moved, and what the optimizer inside gets as their gradients; others are counted."""
    grads = [one.inner_grad() for one in chunk]
    if skip_nonfinite:
        flags = count_nonfinite(chunk, grads, agree, everywhere=True).tolist()
        for one, is_bad in zip(chunk, flags, strict=True):
            if is_bad:
                one.drop_factors()
        finite = [index for index, is_bad in enumerate(flags) if not is_bad]
        return [chunk[index] for index in finite], [grads[index] for index in finite]
    projected = [index for index, one in enumerate(chunk) if one.projection.modes]
    if projected:
        count_nonfinite([chunk[index] for index in projected], [grads[index] for index in projected], agree)
    return chunk, grads


def _coordinates_of(chunk: Sequence[TrainedWeight], grads: Sequence[Tensor]) -> list[Tensor | None]:
    """The coordinates of weights that are stepped together: zeros, in one piece of memory for each dtype.

    Args:
        chunk: the weights.
        grads: the gradient of each, as the optimizer inside gets it.

    Returns:
        One tensor for each, of the gradient's shape; None where the rule moves the weight itself.
    """
    alike: dict[tuple[torch.dtype, torch.Size], list[int]] = {}
    for index, (one, grad) in enumerate(zip(chunk, grads, strict=True)):
        if one.through_coordinates:
            alike.setdefault((grad.dtype, grad.shape), []).append(index)
    sizes: dict[torch.dtype, int] = {}
    starts = {}
    for (dtype, shape), indices in alike.items():
        starts[dtype, shape] = start = sizes.get(dtype, 0)
        sizes[dtype] = start + len(indices) * _apart(shape)
    zeros = {dtype: torch.zeros(size, dtype=dtype, device=grads[0].device) for dtype, size in sizes.items()}
    coordinates: list[Tensor | None] = [None] * len(chunk)
    for (dtype, shape), indices in alike.items():
        strides = (_apart(shape), *(math.prod(shape[axis + 1 :]) for axis in range(len(shape))))
        views = zeros[dtype].as_strided((len(indices), *shape), strides, starts[dtype, shape]).unbind()
        for index, view in zip(indices, views, strict=True):
            coordinates[index] = view
    return coordinates


def _apart(shape: torch.Size) -> int:
    """How many numbers lie between the beginnings of two tensors of a shape that follow each other in memory."""
    return -(-shape.numel() // ALIGNMENT) * ALIGNMENT
