"""`Fits`: that a weight and its state fit each other, looked at where something was replaced since the step before.

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
from galore_torch.optim.fitting import fit
from galore_torch.optim.groups import is_projected
from galore_torch.optim.work import Work


class Fits:
    """In which form each weight and its state have fitted last."""

    def __init__(self) -> None:
        self._forms: dict[int, tuple[_Form, tuple[Any, ...]]] = {}
        self._seen: dict[int, _Seen] = {}
        self._together: tuple[Sequence[Work], list[Any], list[Any]] = ((), [], [])

    def note(self, work: Work) -> None:
        """Notes that a weight and its state fit, as they are.

        Args:
            work: the weight.
        """
        if not self._is_seen(work):
            self._forms[id(work.weight)] = _form(work), _shapes(work.state.get("inner"))
            self._seen[id(work.weight)] = _Seen.of(work)

    def note_all(self, work: Sequence[Work]) -> None:
        """The same for many, which are looked at together as long as they come together.

        Args:
            work: the weights.
        """
        if not self._are_seen(work):
            for one in work:
                self.note(one)
            self._together = work, _parts(work), _values(work)

    def _are_seen(self, work: Sequence[Work]) -> bool:
        """Whether all are as when they were last noted together: compared in a few calls for all of them."""
        before, parts, values = self._together
        return (
            len(work) == len(before)
            and all(map(operator.is_, work, before))
            and _values(work) == values
            and len(now := _parts(work)) == len(parts)
            and all(map(operator.is_, now, parts))
        )

    def _is_seen(self, work: Work) -> bool:
        seen = self._seen.get(id(work.weight))
        return seen is not None and seen.is_still(work)

    def prepare(self, work: Sequence[Work]) -> None:
        """Creates the state of weights where there is none, and casts it where a weight has another dtype or device.

        Args:
            work: the weights, as the next step would see them.

        Raises:
            ValueError: a state does not fit, or a group was changed in a way that a state cannot follow; nothing has
                changed then.
        """
        if self._are_seen(work):
            return
        work = [one for one in work if not self._is_seen(one)]
        fitting = [self._fitting(one) for one in work]
        for one, state in zip(work, fitting, strict=True):
            if state is not None:
                one.state.clear()
                one.state.update(state)
            one.prepare_state()
            self.note(one)

    def _fitting(self, work: Work) -> dict[str, Any] | None:
        """What must take the place of a state; None, as in every ordinary step, where it fits as it is."""
        form, shapes = _form(work), _shapes(work.state.get("inner"))
        before = self._forms.get(id(work.weight))
        if before == (form, shapes) or not work.state:
            return None
        if before is not None and before[0].geometry != form.geometry:
            if shapes or work.state.get("renewals"):
                _refuse_change(work, before[0].geometry, form.geometry)
            return {}  # nothing has been found yet
        return fit(work.state, work, {})


class _Seen(NamedTuple):
    """What cannot change without another object in its place; as long as all are the same nothing need be compared.

    The objects themselves, not their addresses: these are given to others once an object is gone.
    """

    work: Work
    inner: Any
    values: tuple[Any, ...]
    others: tuple[Any, ...]

    @classmethod
    def of(cls, work: Work) -> _Seen:
        inner = work.state.get("inner")
        return cls(work, inner, tuple(inner.values()) if inner else (), _others(work))

    def is_still(self, work: Work) -> bool:
        inner = work.state.get("inner")
        if work is not self.work or inner is not self.inner or len(inner or ()) != len(self.values):
            return False
        return _others(work) == self.others and (not inner or all(map(operator.is_, inner.values(), self.values)))


def _parts(work: Sequence[Work]) -> list[Any]:
    """The objects in the rule's state of many weights, which are the same as long as nothing was replaced."""
    inner = [one.state.get("inner") for one in work]
    return [*inner, *chain.from_iterable([one.values() for one in inner if one])]


def _values(work: Sequence[Work]) -> list[Any]:
    return [(one.weight.dtype, one.weight.shape, one.weight.device, len(one.state)) for one in work]


def _others(work: Work) -> tuple[Any, ...]:
    weight = work.weight
    return weight.dtype, weight.shape, weight.device, len(work.state)


class _Form(NamedTuple):
    """What decides the shapes and dtypes in a weight's state."""

    geometry: tuple[Any, ...]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    coordinates: torch.dtype


def _form(work: Work) -> _Form:
    group, weight = work.group, work.weight
    geometry = tuple([group.get(key) for key in FIXED_KEYS]) if is_projected(group) else (None,)
    return _Form(geometry, weight.shape, weight.dtype, weight.device, work.dtype)


def _refuse_change(work: Work, before: Sequence[Any], now: Sequence[Any]) -> NoReturn:
    pairs = [pair for pair in zip_longest(FIXED_KEYS, before, now) if pair[1] != pair[2]]
    if len(before) != len(now):
        pairs = pairs[:1]  # it has a rank, or has none any more: the other keys follow from that
    changed = ", ".join(f"{key} from {old!r} to {new!r}" for key, old, new in pairs)
    raise ValueError(
        f"the group of {work.name} was changed, {changed}, and the state of its weights has the old shape. Set it "
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
