"""What the rule gets of one weight in a step: its coordinates, or itself, whole or in slices.

A rule that copies what it gets is given slices, so that the copies are small: bitsandbytes on a CPU. They are whole
blocks of its state, and it moves them as it would the whole, so that a weight's state is that of the whole: slices get
views of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_torch import devices
from galore_torch.lowbit import has_numbers
from galore_torch.optim.moments import begins_anew
from galore_torch.optim.rule import InnerParam, Traits
from galore_torch.optim.state_keys import INNER
from galore_torch.optim.trained_weight import TrainedWeight


def inner_params(
    trained: TrainedWeight, projected: Tensor, coordinates: Tensor | None = None
) -> tuple[Tensor, dict[str, Any], list[InnerParam]]:
    """What the rule gets of a weight.

    Args:
        trained: the weight.
        projected: what the rule gets as gradient.
        coordinates: zeros of its shape, where there are any; made if there are none.

    Returns:
        The tensor that the rule moves, its state, and the parameters that the rule gets: the tensor, or slices of it.
    """
    fresh, size = trained.through_coordinates, trained.traits.slice_elements
    tensor = coordinates
    if tensor is None:
        tensor = torch.zeros_like(projected) if fresh else trained.lent()
    inner = {} if begins_anew(trained) else trained.opened(trained.state.get(INNER, {}))
    group, weight = trained.inner_group, trained.weight
    if size is None or not _is_copied(tensor) or tensor.numel() < 2 * size:
        return tensor, inner, [InnerParam(tensor, projected, inner, group, weight, fresh)]
    ends = list(range(size, tensor.numel() - size + 1, size))  # the last takes the rest: none is too small
    parts = tensor.view(-1).tensor_split(ends), projected.reshape(-1).tensor_split(ends)
    states = _states(inner, tensor.numel(), ends, trained.traits)
    slices = zip(*parts, states, strict=True)
    return tensor, inner, [InnerParam(part, grad, state, group, weight, fresh) for part, grad, state in slices]


def keep_inner_state(
    trained: TrainedWeight, tensor: Tensor, inner: dict[str, Any], params: Sequence[InnerParam]
) -> None:
    """Keeps the rule's state of a weight.

    Args:
        trained: the weight.
        tensor: that the rule has moved.
        inner: its state before.
        params: what the rule got, the two as `inner_params` made them.
    """
    inner = whole_state(tensor, inner, params, trained.traits)
    if inner and inner is not trained.state.get(INNER):
        trained.state[INNER] = trained.closed(inner)


def whole_state(tensor: Tensor, inner: dict[str, Any], params: Sequence[InnerParam], traits: Traits) -> dict[str, Any]:
    """The state of a tensor after a step: `inner`, with what the rule has made or counted in those of slices.

    Args:
        tensor: that the rule has moved.
        inner: its state before, into which slices have written.
        params: the tensor, or slices of it.
        traits: of the rule.
    """
    if len(params) == 1:
        return params[0].state
    for name, value in params[0].state.items():
        numbers = _numbers_a_value(name, value, params[0].tensor.numel(), traits)
        if not numbers:
            inner[name] = value
        elif name not in inner:
            made = torch.cat([one.state[name].reshape(-1) for one in params])
            inner[name] = made.view(tensor.shape) if numbers == 1 else made
    return inner


def _is_copied(tensor: Tensor) -> bool:
    """Whether a rule with slices copies a tensor that can be cut: not on a GPU, nor one without numbers."""
    return not devices.runs_ahead(tensor) and tensor.is_contiguous() and has_numbers(tensor)


def _states(inner: Mapping[str, Any], elements: int, ends: Sequence[int], traits: Traits) -> list[dict[str, Any]]:
    states: list[dict[str, Any]] = [{} for _ in range(len(ends) + 1)]
    for name, value in inner.items():
        numbers = _numbers_a_value(name, value, elements, traits)
        parts = value.view(-1).tensor_split([end // numbers for end in ends]) if numbers else [value] * len(states)
        for state, part in zip(states, parts, strict=True):
            state[name] = part
    return states


def _numbers_a_value(name: str, value: Any, elements: int, traits: Traits) -> int:
    """Of how many numbers of a tensor of so many elements each value of its state is; 0 for what is of all of them."""
    if not isinstance(value, Tensor) or name in traits.common or not value.dim():
        return 0
    block = traits.block or 1
    return {elements: 1, -(-elements // block): block}.get(value.numel(), 0)
