"""What the rule is lent of one weight in a step: its coordinates, or itself, whole or in slices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from galore_torch.optim.rule import Lent
from galore_torch.optim.work import Work


def lend(work: Work, image: Tensor, coordinates: Tensor | None = None) -> tuple[Tensor, list[Lent]]:
    """What the rule is lent for a weight.

    Args:
        work: the weight.
        image: what the rule gets as gradient.
        coordinates: zeros of its shape, where there are any; made if there are none.

    Returns:
        The tensor that the rule moves, and what it is lent of it. The rule's state of a slice is under its name.
    """
    if not work.through_coordinates:
        tensor = work.local
    else:
        tensor = torch.zeros_like(image) if coordinates is None else coordinates
    inner, size = work.opened(work.state.get("inner", {})), work.traits.slice_elements
    group, weight = work.lent_group, work.weight
    if size is None or tensor.numel() < 2 * size or not tensor.is_contiguous():
        return tensor, [Lent(tensor=tensor, grad=image, state=inner, group=group, weight=weight)]
    ends = list(range(size, tensor.numel() - size + 1, size))  # the last takes the rest: none is too small
    slices = zip(tensor.view(-1).tensor_split(ends), image.reshape(-1).tensor_split(ends), strict=True)
    return tensor, [
        Lent(tensor=part, grad=grad, state=inner.get(f"slice{number}", {}), group=group, weight=weight)
        for number, (part, grad) in enumerate(slices)
    ]


def take_back(work: Work, lent: Sequence[Lent]) -> None:
    """Keeps the rule's state of what it was lent.

    Args:
        work: the weight.
        lent: as `lend` made it.
    """
    if len(lent) > 1:
        work.state["inner"] = work.closed({f"slice{number}": one.state for number, one in enumerate(lent)})
    elif lent[0].state:
        work.state["inner"] = work.closed(lent[0].state)
