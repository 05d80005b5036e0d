"""Steps weights in chunks: which are stepped together, and the coordinates that they have in that time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from galore_torch import devices
from galore_torch.optim.folding import common_factors, fold
from galore_torch.optim.inner_group import GroupWrites, moves_at_rate_one
from galore_torch.optim.joined import Joined, can_be_joined
from galore_torch.optim.nonfinite import NonfiniteCounter
from galore_torch.optim.rule import InnerParam
from galore_torch.optim.slices import inner_params, keep_inner_state
from galore_torch.optim.state_keys import INNER, STEP
from galore_torch.optim.trained_weight import TrainedWeight

CHUNK_ELEMENTS = 2**23
"""Coordinates that are stepped together at least on a CPU: enough to keep it busy."""

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
    return max(devices.at_a_time(CHUNK_ELEMENTS, weight), int(CHUNK_SHARE * coordinates))


class Chunk:
    """Weights of one rule and device that are stepped together, and what is the same in each of their steps.

    Args:
        weights: at least one.

    Attributes:
        firsts: of the weights of each parameter group the first.
    """

    def __init__(self, weights: list[TrainedWeight]) -> None:
        self.weights = weights
        self.firsts = list({id(one.inner_group): one for one in weights}.values())
        self._projected = [index for index, one in enumerate(weights) if one.projection.modes]
        self._layout: list[_Alike] | None = None
        self._counter: NonfiniteCounter | None = None

    def coordinates(self, grads: Sequence[Tensor]) -> tuple[list[Tensor | None], list[_Together]]:
        """The coordinates of the weights: zeros, in one piece of memory for each dtype.

        Args:
            grads: the gradient of each weight, as the optimizer inside gets it.

        Returns:
            One tensor for each, of the gradient's shape; None where the rule moves the weight itself. And what the rule
            gets of those that are joined: those without a state yet; from the second step on that these weights make
            together also others.
        """
        if is_first := self._layout is None:
            self._layout = _layout(self.weights, grads)
        together: list[_Together] = []
        sizes = {alike.dtype: alike.stop for alike in self._layout}
        zeros = {dtype: torch.zeros(size, dtype=dtype, device=grads[0].device) for dtype, size in sizes.items()}
        coordinates: list[Tensor | None] = [None] * len(grads)
        for alike in self._layout:
            stacked = zeros[alike.dtype].as_strided(alike.shape, alike.strides, alike.start)
            for index, view in zip(alike.indices, stacked.unbind(), strict=True):
                coordinates[index] = view
            if alike.joined is not None:
                own = [grads[index] for index in alike.indices]
                param = alike.joined.param(stacked, own, gathers=not is_first)
                if param is not None:
                    together.append(_Together(alike.joined, alike.indices, param))
        return coordinates, together

    def count_nonfinite(
        self, grads: Sequence[Tensor], agree: Callable[[Tensor], Tensor], *, everywhere: bool = False
    ) -> Tensor:
        """Counts the gradients that are not finite, in the states of the projected weights.

        Args:
            grads: of each weight, as the optimizer inside gets it.
            agree: the largest value of all processes.
            everywhere: whether those of all weights are looked at, and as wholes; else of those that are projected.

        Returns:
            One boolean for each that is looked at.
        """
        looked_at = range(len(grads)) if everywhere else self._projected
        if not looked_at:
            return torch.zeros(0, dtype=torch.bool)
        seen = [grads[index] for index in looked_at]
        if self._counter is None:
            self._counter = NonfiniteCounter([self.weights[index] for index in looked_at], seen)
        return self._counter.count(seen, agree, everywhere=everywhere)


class _Alike(NamedTuple):
    """Weights whose coordinates are of one shape and dtype, and where these lie in the memory of that dtype."""

    dtype: torch.dtype
    shape: tuple[int, ...]  # of all of them together
    strides: tuple[int, ...]
    start: int
    stop: int
    indices: list[int]
    joined: Joined | None


class _Together(NamedTuple):
    """What the rule gets of weights that are joined, and their places in the chunk."""

    joined: Joined
    indices: list[int]
    param: InnerParam


def _layout(weights: Sequence[TrainedWeight], grads: Sequence[Tensor]) -> list[_Alike]:
    kinds: dict[tuple[torch.dtype, torch.Size, int], list[int]] = {}
    for index, (one, grad) in enumerate(zip(weights, grads, strict=True)):
        if one.through_coordinates:
            kinds.setdefault((grad.dtype, grad.shape, id(one.inner_group) * can_be_joined(one)), []).append(index)
    made, stops = [], dict.fromkeys([dtype for dtype, _, _ in kinds], 0)
    for (dtype, shape, is_joined), indices in kinds.items():
        joined = Joined([weights[index] for index in indices]) if is_joined and len(indices) > 1 else None
        apart = shape.numel() if joined else _aligned(shape.numel())
        strides = (apart, *(math.prod(shape[axis + 1 :]) for axis in range(len(shape))))
        start, stops[dtype] = stops[dtype], stops[dtype] + _aligned(len(indices) * apart)
        made.append(_Alike(dtype, (len(indices), *shape), strides, start, stops[dtype], indices, joined))
    return made


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def chunks(trained: Sequence[TrainedWeight], coordinates: int) -> Iterator[Chunk]:
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
                yield Chunk(chunk)
                chunk, elements = [], 0
            chunk.append(one)
            elements += one.coordinate_count
        yield Chunk(chunk)


def step_chunk(
    chunk: Chunk,
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
    if not grads:
        return
    versions = [grad._version for grad in grads]
    coordinates, together = chunk.coordinates(grads)
    alone = set(range(len(grads))).difference(*(one.indices for one in together))
    params = {index: inner_params(chunk.weights[index], grads[index], coordinates[index]) for index in sorted(alone)}
    given = [one.param for one in together] + [part for _, _, parts in params.values() for part in parts]
    wrote = chunk.weights[0].rule.step(given)
    for first in chunk.firsts:
        written.note(first.group, wrote[id(first.inner_group)])
    for one in together:
        one.joined.keep()
    for index, (tensor, inner, parts) in params.items():
        trained, coordinates[index] = chunk.weights[index], tensor
        if inner is not trained.state.get(INNER) or len(parts) > 1:
            keep_inner_state(trained, tensor, inner, parts)
    fold_all(chunk, grads, versions, [one for one in coordinates if one is not None])


def fold_all(chunk: Chunk, grads: Sequence[Tensor], versions: Sequence[int], moved: Sequence[Tensor]) -> None:
    """Puts what the optimizer inside has moved back into the weights.

    Args:
        chunk: the weights.
        grads: what the optimizer inside got as their gradients.
        versions: of those, before it moved anything.
        moved: coordinates, or the weights themselves where they are not projected.
    """
    factors = {id(one.inner_group): common_factors(one) for one in chunk.firsts}
    for one, grad, version, tensor in zip(chunk.weights, grads, versions, moved, strict=True):
        common = factors[id(one.inner_group)]
        if not one.through_coordinates:
            one.given_back(tensor)
        elif common is not None and one.is_plain:
            one.state[STEP] += 1
            one.fold(tensor, *common)
        else:
            is_changed = grad._version != version and moves_at_rate_one(one.group)  # some rules write into gradients
            fold(one, one.given_back(tensor), one.inner_grad() if is_changed else grad)
        if one.drops_factors:
            one.drop_factors()


def _with_gradients(
    chunk: Chunk, agree: Callable[[Tensor], Tensor], *, skip_nonfinite: bool
) -> tuple[Chunk, list[Tensor]]:
    """The weights that are moved, and what the optimizer inside gets as their gradients; others are counted."""
    weights = chunk.weights
    grads = [one.inner_grad() for one in weights]
    if skip_nonfinite:
        flags = chunk.count_nonfinite(grads, agree, everywhere=True).tolist()
        if any(flags):
            for one, is_bad in zip(weights, flags, strict=True):
                if is_bad:
                    one.drop_factors()
            finite = [index for index, is_bad in enumerate(flags) if not is_bad]
            return Chunk([weights[index] for index in finite]), [grads[index] for index in finite]
    else:
        chunk.count_nonfinite(grads, agree)
    return chunk, grads
