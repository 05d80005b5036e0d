"""`StateChecks`: whether a weight and its state still fit each other, checked where something was replaced.

A weight, its group or its state may be changed by hand at any time. An ordinary step compares identities alone.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from galore_torch.group_keys import FIXED_KEYS
from galore_torch.optim.groups import is_projected
from galore_torch.optim.state_keys import INNER, RENEWALS
from galore_torch.optim.state_layout import fit
from galore_torch.optim.trained_weight import TrainedWeight


class StateChecks:
    """In which form each weight and its state have fitted last."""

    def __init__(self) -> None:
        self._forms: dict[int, tuple[_Form, tuple[Any, ...]]] = {}
        self._seen: dict[int, _Seen] = {}
        self._together: tuple[Sequence[TrainedWeight], list[Any], list[int], list[Any]] = ((), [], [], [])

    def note(self, trained: Sequence[TrainedWeight]) -> None:
        """Notes that weights and their states fit, as they are.

        Args:
            trained: the weights.
        """
        for one in trained:
            if not self._is_seen(one):
                self._forms[id(one.weight)] = _form(one), _shapes(one.state.get(INNER))
                self._seen[id(one.weight)] = _Seen.of(one)

    def note_all(self, trained: Sequence[TrainedWeight]) -> None:
        """The same for many, which are looked at together as long as they come together.

        Args:
            trained: the weights.
        """
        if not self._have_seen_states(trained):
            self.note(trained)
            self._together = trained, _kinds(trained), _lengths(trained), inner_parts(trained)

    def _have_seen_states(self, trained: Sequence[TrainedWeight]) -> bool:
        """Whether all have the states with which they were last noted together: compared in a few calls for all."""
        before, _, lengths, parts = self._together
        return (
            len(trained) == len(before)
            and all(map(operator.is_, trained, before))
            and _lengths(trained) == lengths
            and len(now := inner_parts(trained)) == len(parts)
            and all(map(operator.is_, now, parts))
        )

    def _is_seen(self, trained: TrainedWeight) -> bool:
        seen = self._seen.get(id(trained.weight))
        return seen is not None and seen.is_still(trained)

    def prepare(self, trained: Sequence[TrainedWeight]) -> bool:
        """Creates the state of weights where there is none, and casts it where a weight has another dtype or device.

        Args:
            trained: the weights, as the next step would see them.

        Returns:
            Whether a state was cast, so that its tensors are others now.

        Raises:
            ValueError: a state does not fit, or a group was changed in a way that a state cannot follow; nothing has
                changed then.
        """
        if self._have_seen_states(trained) and _kinds(trained) == self._together[1]:
            return False
        trained = [one for one in trained if not self._is_seen(one)]
        fitting = [self._fitting(one) for one in trained]
        for one, state in zip(trained, fitting, strict=True):
            if state is not None:
                one.state.clear()
                one.state.update(state)
            one.prepare_state()
            self.note([one])
        return any(state is not None for state in fitting)

    def _fitting(self, trained: TrainedWeight) -> dict[str, Any] | None:
        """What must take the place of a state; None, as in every ordinary step, where it fits as it is."""
        form, shapes = _form(trained), _shapes(trained.state.get(INNER))
        before = self._forms.get(id(trained.weight))
        if trained.projection.modes and form.shape != trained.projection.shape:
            raise ValueError(
                f"{trained.name} has shape {tuple(form.shape)} now, and the optimizer was made for "
                f"{tuple(trained.projection.shape)}; resize weights before it is made"
            )
        if before == (form, shapes) or not trained.state:
            return None
        if before is not None and before[0].geometry != form.geometry:
            if shapes or trained.state.get(RENEWALS):
                _refuse_change(trained, before[0].geometry, form.geometry)
            return {}  # nothing has been found yet
        return fit(trained.state, trained, {})


class _Seen(NamedTuple):
    """What cannot change without another object in its place; as long as all are the same nothing need be compared.

    The objects themselves, not their addresses: these are given to others once an object is gone.
    """

    trained: TrainedWeight
    inner: Any
    values: tuple[Any, ...]
    others: tuple[Any, ...]

    @classmethod
    def of(cls, trained: TrainedWeight) -> _Seen:
        inner = trained.state.get(INNER)
        return cls(trained, inner, tuple(inner.values()) if inner else (), _others(trained))

    def is_still(self, trained: TrainedWeight) -> bool:
        inner = trained.state.get(INNER)
        if trained is not self.trained or inner is not self.inner or len(inner or ()) != len(self.values):
            return False
        return _others(trained) == self.others and (not inner or all(map(operator.is_, inner.values(), self.values)))


def inner_parts(trained: Sequence[TrainedWeight]) -> list[Any]:
    """The objects in the rule's state of many weights, which are the same as long as nothing was replaced.

    Args:
        trained: the weights.
    """
    inner = [one.state.get(INNER) for one in trained]
    return [*inner, *chain.from_iterable([one.values() for one in inner if one])]


def _kinds(trained: Sequence[TrainedWeight]) -> list[Any]:
    weights = [one.weight for one in trained]
    return [*[one.dtype for one in weights], *[one.shape for one in weights], *[one.device for one in weights]]


def _lengths(trained: Sequence[TrainedWeight]) -> list[int]:
    return [len(one.state) for one in trained]


def _others(trained: TrainedWeight) -> tuple[Any, ...]:
    weight = trained.weight
    return weight.dtype, weight.shape, weight.device, len(trained.state)


class _Form(NamedTuple):
    """What decides the shapes and dtypes in a weight's state."""

    geometry: tuple[Any, ...]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    coordinates: torch.dtype


def _form(trained: TrainedWeight) -> _Form:
    group, weight = trained.group, trained.weight
    geometry = tuple([group.get(key) for key in FIXED_KEYS]) if is_projected(group) else (None,)
    return _Form(geometry, weight.shape, weight.dtype, weight.device, trained.dtype)


def _refuse_change(trained: TrainedWeight, before: Sequence[Any], now: Sequence[Any]) -> NoReturn:
    pairs = [pair for pair in zip_longest(FIXED_KEYS, before, now) if pair[1] != pair[2]]
    if len(before) != len(now):
        pairs = pairs[:1]  # it has a rank, or has none any more: the other keys follow from that
    changed = ", ".join(f"{key} from {old!r} to {new!r}" for key, old, new in pairs)
    raise ValueError(
        f"the group of {trained.name} was changed, {changed}, and the state of its weights has the old shape. Set it "
        "back; or, to go on with the new value, begin their state anew: "
        "for weight in group['params']: optimizer.state.pop(weight, None)"
    )


def _shapes(inner: Any) -> tuple[Any, ...]:
    if inner is None:
        return ()
    return tuple(
        value.shape if isinstance(value, Tensor) else _shapes(value) if isinstance(value, dict) else None
        for value in inner.values()
    )
