"""Weights that the optimizer inside moves as one tensor: alike, small and many, where it moves each number by itself.

Many small weights cost the host more than the device: AdamW alone looks into the state of each tensor several times.
Coordinates that are alike are stacked in memory anyway; here their states are, too. What is held of a weight is as it
is without this, but views of the common state, so that a weight can be moved by itself again at any time.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from galore_torch import devices
from galore_torch.optim.rule import ELEMENTWISE, InnerParam
from galore_torch.optim.state_checks import inner_parts
from galore_torch.optim.state_keys import INNER, STEP
from galore_torch.optim.trained_weight import TrainedWeight

SMALL, SMALL_ON_GPU = 2**12, 2**20
"""Numbers of a tensor up to which a call for it takes longer than stacking its gradient with those of others."""


def can_be_joined(trained: TrainedWeight) -> bool:
    """Whether a weight may be moved as a part of one tensor.

    Args:
        trained: the weight, through coordinates.
    """
    small = SMALL_ON_GPU if devices.runs_ahead(trained.weight) else SMALL
    return (
        type(trained) is TrainedWeight
        and trained.is_plain
        and trained.rule.name in ELEMENTWISE
        and trained.coordinate_count <= small
    )


class Joined:
    """Weights that are moved as one tensor, as long as all make the same steps.

    Args:
        weights: of one group, whose coordinates have one shape and dtype.
    """

    def __init__(self, weights: Sequence[TrainedWeight]) -> None:
        self._weights = weights
        self._state: dict[str, Any] = {}
        self._parts: list[Any] = []  # none until the rule has made a state
        self._counts: list[Tensor] = []
        self._versions: list[int] = []

    def param(self, coordinates: Tensor, grads: list[Tensor], *, gathers: bool) -> InnerParam | None:
        """What the rule gets of all of them; None where each has to be moved by itself.

        Args:
            coordinates: of all of them, stacked.
            grads: of each, as the rule gets it.
            gathers: whether states that each has already are put together, by copies. Their counts of steps are read
                for that; on a GPU only of states that were there before this run's.
        """
        first = self._weights[0]
        if first.group.get("moments") == "reset":  # of each at its own turn
            return None
        if not (self._is_current() or self._begin(coordinates, gathers=gathers)):
            return None
        return InnerParam(coordinates, torch.stack(grads), self._state, first.inner_group, first.weight, True)

    def keep(self) -> None:
        """Gives the weights their parts of the state, once the rule has moved them."""
        if not self._parts:
            self._hand_out()
        for count in self._counts:
            count[1:].copy_(count[:1])
        self._versions = [count._version for count in self._counts]

    def _is_current(self) -> bool:
        """Whether nothing was replaced since they were last moved together, and none was moved by itself."""
        if not self._parts or self._versions != [count._version for count in self._counts]:
            return False
        parts = inner_parts(self._weights)
        return len(parts) == len(self._parts) and all(map(operator.is_, parts, self._parts))

    def _begin(self, coordinates: Tensor, *, gathers: bool) -> bool:
        if len({one.state[STEP] for one in self._weights}) > 1 or devices.is_captured(coordinates):
            return False
        states = [one.state.get(INNER) for one in self._weights]
        waits = all(one.is_resumed for one in self._weights)
        found = {} if not any(states) else _joined(states, coordinates.shape[1:], waits) if gathers else None
        if found is None:
            return False
        self._state, self._parts = found, []
        if found:
            self._hand_out()
        return True

    def _hand_out(self) -> None:
        """Puts views of the common state into those of the weights."""
        self._counts = []
        for name, value in self._state.items():
            parts = value
            if not value.dim():
                parts = value.repeat(len(self._weights))
                self._state[name] = parts[0]
                self._counts.append(parts)
            for one, part in zip(self._weights, parts.unbind(), strict=True):
                one.state.setdefault(INNER, {})[name] = part
        self._parts = inner_parts(self._weights)


def _joined(states: Sequence[Any], shape: torch.Size, waits: bool) -> dict[str, Any] | None:
    """The states of tensors as that of these stacked; None where they differ, or are not of this kind."""
    first = states[0]
    if not first or any(not one or one.keys() != first.keys() for one in states):
        return None
    made = {}
    for name in first:
        values = [one[name] for one in states]
        one = values[0]
        if any(type(value) is not Tensor or _kind(value) != _kind(one) for value in values):
            return None
        if one.shape == shape:
            made[name] = torch.stack(values)
        elif not one.dim() and (waits or not devices.runs_ahead(one)) and (torch.stack(values) == one).all():
            made[name] = one.clone()
        else:
            return None
    return made


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device
