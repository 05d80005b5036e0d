"""Whether a weight's state fits the weight: state of a wrong shape never reaches a kernel, which might not look.

What a state must look like is found by making one: the rule takes a step on numbers of the right shape that are thrown
away, whatever the rule is. That is done where a state has come from elsewhere, or where a weight, its group or its
state has been changed by hand. An ordinary step only compares shapes with those of the step before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from galore_torch.optim.lent import lend
from galore_torch.optim.work import Work

MADE_ANEW = {"gap", "overlaps", "captured", "lacking", "compensation"}
"""What checkpoints of older versions do not have, and of other roundings."""

KEPT_BY: list[tuple[set[str], str]] = []
"""Names of optimizers by what their state holds, for messages; the first that fits counts. `recipes` fills it."""

REMEDY = (
    "Build the model and the optimizer as they were when the state was saved, or do not load it, to start the "
    "optimizer anew"
)


class TrialError(RuntimeError):
    """What a rule raised when it was tried, to see what it keeps: it cannot use its group's values."""


Known = dict[Any, Any]
"""What rules keep, by what they are lent, so that no question is asked twice."""


@dataclass(frozen=True)
class Leaf:
    """What is asked of one tensor.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        device: where it is.
        kind: its class.
        parts: of a tensor that is stored in others, those by name.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    kind: type
    parts: tuple[tuple[str, Leaf], ...] = ()

    @classmethod
    def of(cls, tensor: Tensor) -> Leaf:
        """The leaf that a tensor is."""
        names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
        parts = tuple((name, cls.of(getattr(tensor, name))) for name in names)
        kind = Tensor if type(tensor) is torch.nn.Parameter else type(tensor)
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device, kind, parts)


def fit(state: Mapping[str, Any], work: Work, known: Known) -> dict[str, Any]:
    """A state as the weight's next step can use it: on its device, in the dtypes that are asked for now.

    Codes, counts and the like keep their dtype, but for whole numbers that come back as floats.

    Args:
        state: of one weight, from anywhere.
        work: the weight, as the next step would see it.
        known: what is known of rules; added to.

    Returns:
        The state; the tensors that fit are the very same.

    Raises:
        ValueError: another shape, another optimizer's state, or a value of a kind that cannot be meant.
        TrialError: the rule cannot step such a weight.
    """
    try:
        return _fit(state, work, known, 1.0)
    except ValueError as error:
        if work.through_coordinates:
            raise
        try:  # what some rules keep of a weight that began as zeros has another shape
            return _fit(state, work, known, 0.0)
        except ValueError:
            raise error from None


def _fit(state: Mapping[str, Any], work: Work, known: Known, start: float) -> dict[str, Any]:
    if not state:
        return {}
    blank = replace(work, state={})
    blank.prepare_state()
    ours = {key: _layout(value) for key, value in blank.state.items()}
    inner = _inner_layout(work, known, start)
    given = dict(state)
    if "compensation" not in ours:
        given.pop("compensation", None)  # of another rounding
    if "step" not in ours:
        given.pop("step", None)  # of coordinates, and the weight is moved without them now
    elif "step" not in given and not work.projection.modes:
        given["step"] = _steps_in(given.get("inner"))
    if inner and given.get("step", 0) == 0 and "inner" not in given:
        inner = {}  # prepared, and not stepped yet
    expected = {**ours, "inner": inner} if inner or "inner" in given else ours
    if "inner" in given:
        given["inner"] = work.opened(given["inner"])
    for key in MADE_ANEW & expected.keys() - given.keys():
        given[key] = blank.state[key]
    if "overlaps" in ours and isinstance(given["overlaps"], Tensor) and given["overlaps"].dim() == 1:
        size = ours["overlaps"].shape[0]
        given["overlaps"] = torch.nn.functional.pad(given["overlaps"], (max(0, size - len(given["overlaps"])), 0))
        given["overlaps"] = given["overlaps"][-size:]
    fitted: dict[str, Any] = _fitted(given, expected, "", work)
    return {**fitted, "inner": work.closed(fitted["inner"])} if "inner" in fitted else fitted


def _inner_layout(work: Work, known: Known, start: float) -> dict[str, Any]:
    """What the rule keeps of a weight, as leaves."""
    weight, shape = work.local, work.local_projection.image_shape
    through = work.through_coordinates
    key = (id(work.lent_group), id(work.rule), through, shape, work.dtype, weight.device, weight.is_contiguous(), start)
    if key not in known:
        devices = [weight.device] if weight.device.type not in ("cpu", "meta") else []
        with torch.random.fork_rng(devices, device_type=weight.device.type if devices else "cuda"), torch.no_grad():
            try:
                known[key] = _tried(work, start)
            except Exception as error:  # whatever a foreign optimizer raises
                raise TrialError(f"{work.rule.name} cannot step {work.name}: {error}") from error
    return known[key]  # type: ignore[no-any-return]


def _tried(work: Work, start: float) -> dict[str, Any]:
    weight = work.weight
    if work.through_coordinates:
        image = torch.ones(work.local_projection.image_shape, dtype=work.dtype, device=weight.device)
    else:
        weight = torch.full_like(weight, start, requires_grad=False)
        image = torch.ones_like(work.local)
    _, lent = lend(replace(work, weight=weight, state={}), image)
    rule, layouts = work.rule.again(), {}
    for one in lent:
        if one.tensor.shape not in layouts:
            for _ in range(2):
                rule.step([one])
            layouts[one.tensor.shape] = _layout(one.state)
    if len(lent) == 1:
        return layouts[lent[0].tensor.shape]  # type: ignore[no-any-return]
    return {f"slice{number}": layouts[one.tensor.shape] for number, one in enumerate(lent)}


def _layout(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _layout(value) for key, value in tree.items()}
    return Leaf.of(tree) if isinstance(tree, Tensor) else tree


def _steps_in(inner: Any) -> int:
    """How many steps a rule's state says it has made."""
    if isinstance(inner, Mapping):
        for key in ("step", "slice0"):
            if isinstance(inner.get(key), Mapping):
                return _steps_in(inner[key])
            if isinstance(inner.get(key), (int, float)) or (
                isinstance(inner.get(key), Tensor) and not inner[key].dim()
            ):
                return int(inner[key])
    return 0


def _fitted(value: Any, expected: Any, path: str, work: Work) -> Any:
    if isinstance(expected, dict):
        if not isinstance(value, Mapping) or value.keys() != expected.keys():
            _refuse_keys(value, expected, path, work)
        return {key: _fitted(one, expected[key], f"{path}.{key}".strip("."), work) for key, one in value.items()}
    if isinstance(expected, Leaf):
        return _fitted_tensor(value, expected, path, work)
    if isinstance(expected, (int, float)) and not isinstance(expected, bool):
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
            value = value.item()
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and isinstance(expected, int) and value == value // 1:
            return int(value)
        if is_number and isinstance(expected, float):
            return value
    elif isinstance(value, type(expected)):
        return value
    return _refuse(work, f"{path} is {_shown(value)}, where a {type(expected).__name__} is needed")


def _fitted_tensor(value: Any, leaf: Leaf, path: str, work: Work) -> Tensor:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and leaf.shape == ():
        value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    if not isinstance(value, Tensor):
        _refuse(work, f"{path} is {_shown(value)}, where a tensor of shape {leaf.shape} is needed")
    if tuple(value.shape) != leaf.shape:
        _refuse(work, f"{path} has shape {tuple(value.shape)}, where {leaf.shape} is needed")
    found = Leaf.of(value)
    if found == leaf:
        return value
    if found.kind is not leaf.kind:
        _refuse(work, f"{path} is a {found.kind.__name__}, where a {leaf.kind.__name__} is needed")
    if found.dtype != leaf.dtype and not _is_cast_kept(value, leaf.dtype):
        _refuse(work, f"{path} is {found.dtype}, where {leaf.dtype} is needed")
    made = value.to(device=leaf.device, dtype=leaf.dtype)
    for (name, have), (_, need) in zip(Leaf.of(made).parts, leaf.parts, strict=False):
        if (have.shape, have.dtype) != (need.shape, need.dtype):
            _refuse(work, f"{path} has {name} of {have.shape}, {have.dtype}; {need.shape}, {need.dtype} is needed")
    return made


def _is_cast_kept(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether a cast is meant: between floating dtypes, or of whole numbers that lose nothing by it."""
    if dtype.is_floating_point:
        return value.is_floating_point()
    if dtype.is_complex or value.is_complex() or value.dtype == torch.bool:
        return False
    return torch.equal(value.to(dtype).to(value.dtype), value)


def _refuse_keys(value: Any, expected: Mapping[str, Any], path: str, work: Work) -> NoReturn:
    where = f"{path} " if path else ""
    if not isinstance(value, Mapping):
        _refuse(work, f"{where}is {_shown(value)}, where a dictionary of {_names(expected)} is needed")
    if path == "inner" and ("slice0" in value) | ("slice0" in expected):
        shape = work.projection.image_shape
        _refuse(
            work, f"it is of {_count(value):,} numbers, where {shape} is needed, {torch.Size(shape).numel():,} numbers"
        )
    if path.startswith("inner"):
        kept_by = next((f", as that of {name} does" for keys, name in KEPT_BY if keys <= value.keys()), "")
        _refuse(
            work,
            f"it is of another optimizer, or of another setting of it: it holds {_names(value)}{kept_by}, and "
            f"{work.rule.name} keeps {_names(expected)} here",
        )
    lacks, foreign = expected.keys() - value.keys(), value.keys() - expected.keys()
    parts = [f"lacks {_names(lacks)}"] * bool(lacks) + [f"holds {_names(foreign)}, which mean nothing here"] * bool(
        foreign
    )
    _refuse(work, f"{where}{' and '.join(parts)}")


def _shown(value: Any) -> str:
    shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return shown if len(shown) < 60 else f"a {type(value).__name__}"


def _names(keys: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, keys))) or "nothing"


def _count(inner: Mapping[str, Any]) -> int:
    """How many numbers a rule's state is of: as many as the largest tensor has, in all slices."""
    slices = [one for one in inner.values() if isinstance(one, Mapping)] or [inner]
    return sum(max((t.numel() for t in one.values() if isinstance(t, Tensor)), default=0) for one in slices)


def _refuse(work: Work, why: str) -> NoReturn:
    shape = "" if "of shape" in work.name else f" (a weight of shape {tuple(work.weight.shape)})"
    raise ValueError(f"the optimizer's state of {work.name}{shape} does not fit: {why}. {REMEDY}")
