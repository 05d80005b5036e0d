"""Where parameters stand in an optimizer's groups: what a layer's turn and its random numbers depend on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from galore_torch.optim.groups import is_projected


@dataclass(frozen=True, slots=True)
class Position:
    """One parameter's place.

    Attributes:
        weight: the parameter.
        groups: the optimizer's groups.
        group_index: which of them holds it.
        index: its index there.
        among_all: how many parameters stand before it.
        among_projected: how many projected parameters stand before it.
        projected: how many there are.
    """

    weight: Tensor
    groups: tuple[dict[str, Any], ...]
    group_index: int
    index: int
    among_all: int
    among_projected: int
    projected: int

    @property
    def group(self) -> dict[str, Any]:
        """The group that holds it."""
        return self.groups[self.group_index]


def positions(groups: Sequence[dict[str, Any]]) -> Iterator[Position]:
    """The places of all parameters.

    Args:
        groups: an optimizer's groups.

    Yields:
        One place for each parameter, in order.
    """
    count = sum(len(group["params"]) for group in groups if is_projected(group))
    kept, before, among_all = tuple(groups), 0, 0
    for group_index, group in enumerate(kept):
        for index, weight in enumerate(group["params"]):
            yield Position(weight, kept, group_index, index, among_all, before, count)
            before += is_projected(group)
            among_all += 1
