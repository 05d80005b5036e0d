"""What the rule gets of one weight in a step: its coordinates, or itself, whole or in slices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from galore_torch.lowbit import has_numbers
from galore_torch.optim.moments import begins_anew
from galore_torch.optim.rule import InnerParam
from galore_torch.optim.state_keys import INNER
from galore_torch.optim.trained_weight import TrainedWeight


def inner_params(
    trained: TrainedWeight, projected: Tensor, coordinates: Tensor | None = None
) -> tuple[Tensor, list[InnerParam]]:
    """What the rule gets of a weight.

    Args:
        trained: the weight.
        projected: what the rule gets as gradient.
        coordinates: zeros of its shape, where there are any; made if there are none.

    Returns:
        The tensor that the rule moves, and the parameters that it gets: the tensor, or slices of it.
    """
    fresh, size = trained.through_coordinates, trained.traits.slice_elements
    tensor = coordinates
    if tensor is None:
        tensor = torch.zeros_like(projected) if fresh else trained.lent()
    inner = {} if begins_anew(trained) else trained.opened(trained.state.get(INNER, {}))
    group, weight = trained.inner_group, trained.weight
    # One that has sizes and no numbers stays whole: slices are whole blocks, so that their states take the same bytes.
    if size is None or tensor.numel() < 2 * size or not tensor.is_contiguous() or not has_numbers(tensor):
        return tensor, [InnerParam(tensor, projected, inner, group, weight, fresh)]
    ends = list(range(size, tensor.numel() - size + 1, size))  # the last takes the rest: none is too small
    slices = zip(tensor.view(-1).tensor_split(ends), projected.reshape(-1).tensor_split(ends), strict=True)
    return tensor, [
        InnerParam(part, grad, inner.get(f"slice{number}", {}), group, weight, fresh)
        for number, (part, grad) in enumerate(slices)
    ]


def keep_inner_state(trained: TrainedWeight, params: Sequence[InnerParam]) -> None:
    """Keeps the rule's state of a weight; that of slices under their names.

    Args:
        trained: the weight.
        params: as `inner_params` made it.
    """
    if len(params) > 1:
        trained.state[INNER] = trained.closed({f"slice{number}": one.state for number, one in enumerate(params)})
    elif params[0].state and params[0].state is not trained.state.get(INNER):
        trained.state[INNER] = trained.closed(params[0].state)
