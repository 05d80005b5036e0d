"""`WeightCache`: what an optimizer knows of its weights, built once, and again when something was replaced.

Groups are added, and replaced when a checkpoint is loaded; FSDP2 and Accelerate swap the parameters inside them; a user
changes a group's rank or takes a weight's state away. The optimizer is not notified, so it compares identities.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galore_torch.group_keys import FIXED_KEYS, KEYS
from galore_torch.optim.arguments import HYPERPARAMETERS, check_hyperparameters
from galore_torch.optim.chunks import Chunk, chunks
from galore_torch.optim.groups import check_keys
from galore_torch.optim.positions import Position, positions
from galore_torch.optim.precision import ASKED
from galore_torch.optim.state_keys import NONFINITE
from galore_torch.optim.trained_weight import TrainedWeight

DECIDING = (*FIXED_KEYS, "update_proj_gap", "stagger", "residual", *ASKED)
"""Keys of a group that decide what is known of a weight. All others are read from the group when they are used."""

_SETTLED = tuple(name for name in HYPERPARAMETERS if name != "lr")  # which a schedule changes in each step
READ_LATER = (*_SETTLED, *(name for name in KEYS if name not in DECIDING))
"""Those that are read when they are used, and checked where they are others than before."""

Make = Callable[[Position], TrainedWeight]
_versions = itertools.count(1)


class _Seen(NamedTuple):
    """A group as it was when works were made from it."""

    group: dict[str, Any]
    weights: list[Tensor]
    values: list[Any]
    read_later: list[Any]

    @classmethod
    def of(cls, group: dict[str, Any]) -> _Seen:
        return cls(group, list(group["params"]), _values(group), list(map(group.get, READ_LATER)))

    def is_current(self, group: dict[str, Any]) -> bool:
        weights, read_later = group["params"], list(map(group.get, READ_LATER))
        if read_later != self.read_later or type(group.get("lr")) is str:
            _check(group, dict(zip(_SETTLED, self.read_later, strict=False)))
            self.read_later[:] = map(group.get, READ_LATER)
        return (
            group is self.group
            and len(weights) == len(self.weights)
            and all(map(operator.is_, weights, self.weights))
            and _values(group) == self.values
        )


def _check(group: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Refuses keys of a group that are not allowed, by what was there before; where nothing is known, strings alone."""
    check_keys(group)
    given = {name: group[name] for name in HYPERPARAMETERS if name in group}
    now = {name: value for name, value in given.items() if name in before or isinstance(value, str)}
    check_hyperparameters(now, {**dict.fromkeys(now, 0.01), **before}, " in a parameter group")


def _values(group: Mapping[str, Any]) -> list[Any]:
    return [id(group.get("param_names")), *map(group.get, DECIDING)]


class WeightCache:
    """What an optimizer knows of each weight.

    Attributes:
        version: another number whenever something else is known, or a step has been made.
        coordinates: how many all weights have together.
    """

    def __init__(self) -> None:
        self.version = next(_versions)
        self.coordinates = 0
        self._trained: list[TrainedWeight] = []
        self._held: tuple[list[Tensor], list[Any]] | None = None
        self._of_weight: dict[int, tuple[TrainedWeight, int, int]] = {}
        self._seen: list[_Seen] = []
        self._chunked: dict[int, tuple[Sequence[TrainedWeight], list[torch.device], list[Chunk]]] = {}

    def all(self, groups: Sequence[dict[str, Any]], state: Mapping[Any, Any], make: Make) -> list[TrainedWeight]:
        """What is known of all weights, in order.

        Args:
            groups: the optimizer's groups now.
            state: its state now.
            make: makes one.

        Returns:
            The same ones as before, unless a group, a parameter or a state is another.
        """
        if not self._are_current(groups, state):
            self._make(groups, make)
        return self._trained

    def chunks(self, trained: Sequence[TrainedWeight]) -> list[Chunk]:
        """Which weights are stepped together, the same as long as the same ones are to be.

        Args:
            trained: those that make a step.
        """
        if not trained:
            return []
        devices = [one.weight.device for one in trained]
        first = id(trained[0])  # inside the backward some come together, others after them
        before, on, made = self._chunked.get(first, ((), [], []))
        if on != devices or not all(map(operator.is_, before, trained)):
            made = list(chunks(trained, self.coordinates))
            self._chunked[first] = trained, devices, made
        return made

    def changed(self) -> None:
        """Notes that weights have made a step."""
        self.version = next(_versions)

    def known(self, weight: Tensor) -> TrainedWeight | None:
        """What was known of one weight when all were last asked for.

        Args:
            weight: a parameter.

        Returns:
            None if nothing was.
        """
        found = self._of_weight.get(id(weight))
        return found[0] if found is not None and found[0].weight is weight else None

    def on(
        self, weight: Tensor, groups: Sequence[dict[str, Any]], state: Mapping[Any, Any], make: Make
    ) -> TrainedWeight | None:
        """What is known of one weight; for callers that act on one at a time.

        Args:
            weight: a parameter.
            groups: the optimizer's groups now.
            state: its state now.
            make: makes one.

        Returns:
            None if the optimizer does not hold it.
        """
        found = self._found(weight, groups, state)
        if found is None:
            self._make(groups, make)
            found = self._found(weight, groups, state)
        return found

    def _found(
        self, weight: Tensor, groups: Sequence[dict[str, Any]], state: Mapping[Any, Any]
    ) -> TrainedWeight | None:
        if id(weight) not in self._of_weight or len(groups) != len(self._seen):
            return None
        trained, at, index = self._of_weight[id(weight)]
        group, seen = groups[at], self._seen[at]
        is_held = group is seen.group and len(group["params"]) == len(seen.weights) and group["params"][index] is weight
        return trained if is_held and _values(group) == seen.values and trained.is_current(state.get(weight)) else None

    def _are_current(self, groups: Sequence[dict[str, Any]], state: Mapping[Any, Any]) -> bool:
        return (
            len(groups) == len(self._seen)
            and all(seen.is_current(group) for seen, group in zip(self._seen, groups, strict=True))
            and self._states_are_current(state)
        )

    def _states_are_current(self, state: Mapping[Any, Any]) -> bool:
        if self._held is not None:  # what it was when it was last current: as a rule it still is
            weights, states = self._held
            same = len(state) == len(weights) and all(map(operator.is_, state, weights))
            if same and all(map(operator.is_, state.values(), states)):
                return True
        if not all(trained.is_current(state.get(trained.weight)) for trained in self._trained):
            return False
        self._held = list(state), list(state.values())
        return True

    def _make(self, groups: Sequence[dict[str, Any]], make: Make) -> None:
        for group in groups:
            _check(group, {})
        self.changed()
        self._chunked.clear()
        held = list(positions(groups))
        self._trained = [make(place) for place in held]
        self._held = None
        self.coordinates = sum([one.coordinate_count for one in self._trained])
        self._of_weight = {
            id(place.weight): (trained, place.group_index, place.index)
            for place, trained in zip(held, self._trained, strict=True)
        }
        self._seen = [_Seen.of(group) for group in groups]
        _count_together(self._trained)
        shared: dict[tuple[int, bool], dict[str, Any]] = {}
        for one in self._trained:
            one.inner_group = shared.setdefault((id(one.group), one.through_coordinates), one.inner_group)


def _count_together(all_trained: Sequence[TrainedWeight]) -> None:
    """Lets the counters of all weights on a device be views of one tensor, so that one operation adds to many."""
    by_device: dict[torch.device, list[TrainedWeight]] = {}
    for trained in all_trained:
        if trained.projection.modes:
            by_device.setdefault(trained.weight.device, []).append(trained)
    for device, alike in by_device.items():
        counters = torch.zeros(len(alike), dtype=torch.int64, device=device)
        known = [
            (slot, trained) for slot, trained in enumerate(alike) if isinstance(trained.state.get(NONFINITE), Tensor)
        ]
        for slot, trained in known:
            counters[slot].copy_(trained.state[NONFINITE])
        for slot, trained in enumerate(alike):
            trained.counters, trained.slot = counters, slot
            if NONFINITE in trained.state:
                trained.state[NONFINITE] = counters[slot]
