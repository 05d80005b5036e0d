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

from galore_torch.optim.slices import inner_params, whole_state
from galore_torch.optim.state_keys import (
    BASIS,
    CAPTURED,
    COMPENSATION,
    GAP,
    INNER,
    LACKING,
    OVERLAPS,
    RESIDUAL_ENERGY,
    RESIDUAL_NORM,
    STEP,
)
from galore_torch.optim.trained_weight import TrainedWeight

OF_CHOICES = {COMPENSATION, RESIDUAL_NORM, RESIDUAL_ENERGY}
"""What only some roundings and residuals keep: dropped where it is of another one."""

MADE_ANEW = {GAP, OVERLAPS, CAPTURED, LACKING, *OF_CHOICES}
"""What checkpoints of older versions do not have, and of other choices."""

KEPT_BY: list[tuple[set[str], str]] = []
"""Names of optimizers by what their state holds, for messages; the first that fits counts. `recipes` fills it."""

REMEDY = (
    "Build the model and the optimizer as they were when the state was saved, or do not load it, to start the "
    "optimizer anew"
)


class TrialError(RuntimeError):
    """What a rule raised when it was tried, to see what it keeps: it cannot use its group's values."""


LayoutCache = dict[Any, Any]
"""What rules keep, by what they get, so that each is tried once."""


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
        held = [(name, getattr(tensor, name)) for name in names]  # of a DTensor its mesh, too
        parts = tuple((name, cls.of(part)) for name, part in held if isinstance(part, Tensor))
        kind = Tensor if type(tensor) is torch.nn.Parameter else type(tensor)
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device, kind, parts)


def fit(state: Mapping[str, Any], trained: TrainedWeight, known: LayoutCache) -> dict[str, Any]:
    """A state as the weight's next step can use it: on its device, in the dtypes that are asked for now.

    Codes, counts and the like keep their dtype, but for whole numbers that come back as floats.

    Args:
        state: of one weight, from anywhere.
        trained: the weight, as the next step would see it.
        known: what is known of rules; added to.

    Returns:
        The state; the tensors that fit are the very same.

    Raises:
        ValueError: another shape, another optimizer's state, or a value of a kind that cannot be meant.
        TrialError: the rule cannot step such a weight.
    """
    try:
        return _fit(state, trained, known, 1.0)
    except ValueError as error:
        if trained.through_coordinates:
            raise
        try:  # what some rules keep of a weight that began as zeros has another shape
            return _fit(state, trained, known, 0.0)
        except ValueError:
            raise error from None


def _fit(state: Mapping[str, Any], trained: TrainedWeight, known: LayoutCache, start: float) -> dict[str, Any]:
    if not state:
        return {}
    blank = replace(trained, state={})
    blank.prepare_state()
    ours = {key: _layout(value) for key, value in blank.state.items()}
    inner = _inner_layout(trained, known, start)
    given = dict(state)
    for key in OF_CHOICES - ours.keys():
        given.pop(key, None)
    if STEP not in ours:
        given.pop(STEP, None)  # of coordinates, and the weight is moved without them now
    elif STEP not in given and not trained.projection.modes:
        given[STEP] = _steps_in(given.get(INNER))
    if inner and given.get(STEP, 0) == 0 and INNER not in given:
        inner = {}  # prepared, and not stepped yet
    expected = {**ours, INNER: inner} if inner or INNER in given else ours
    if INNER in given:
        given[INNER] = trained.opened(given[INNER])
    if BASIS in ours and _has_shapes(given.get(BASIS), ours[BASIS]):
        given[BASIS] = trained.held_basis(given[BASIS])
    for key in MADE_ANEW & expected.keys() - given.keys():
        given[key] = blank.state[key]
    if OVERLAPS in ours and isinstance(given[OVERLAPS], Tensor) and given[OVERLAPS].dim() == 1:
        size = ours[OVERLAPS].shape[0]
        given[OVERLAPS] = torch.nn.functional.pad(given[OVERLAPS], (max(0, size - len(given[OVERLAPS])), 0))
        given[OVERLAPS] = given[OVERLAPS][-size:]
    fitted: dict[str, Any] = _fitted(given, expected, "", trained)
    return {**fitted, INNER: trained.closed(fitted[INNER])} if INNER in fitted else fitted


def _inner_layout(trained: TrainedWeight, known: LayoutCache, start: float) -> dict[str, Any]:
    """What the rule keeps of a weight, as leaves."""
    weight, shape = trained.local, trained.local_projection.projected_shape
    through = trained.through_coordinates
    key = (
        id(trained.inner_group),
        id(trained.rule),
        through,
        shape,
        trained.dtype,
        weight.device,
        weight.is_contiguous(),
        start,
    )
    if key not in known:
        devices = [weight.device] if weight.device.type not in ("cpu", "meta") else []
        with torch.random.fork_rng(devices, device_type=weight.device.type if devices else "cuda"), torch.no_grad():
            try:
                known[key] = _tried(trained, start)
            except Exception as error:  # whatever a foreign optimizer raises
                raise TrialError(f"{trained.rule.name} cannot step {trained.name}: {error}") from error
    return known[key]  # type: ignore[no-any-return]


def _tried(trained: TrainedWeight, start: float) -> dict[str, Any]:
    weight = trained.weight
    if trained.through_coordinates:
        projected = torch.ones(trained.local_projection.projected_shape, dtype=trained.dtype, device=weight.device)
    else:
        weight = torch.full_like(weight, start, requires_grad=False)
        projected = torch.ones_like(trained.local)
    tensor, inner, params = inner_params(replace(trained, weight=weight, state={}), projected)
    rule = trained.rule.again()
    states: dict[torch.Size, dict[str, Any]] = {}
    for one in params:
        if one.tensor.shape not in states:  # slices of one size have states alike
            for _ in range(2):
                rule.step([one])
        one.state = states.setdefault(one.tensor.shape, one.state)
    layout: dict[str, Any] = _layout(whole_state(tensor, inner, params, trained.traits))
    return layout


def _layout(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _layout(value) for key, value in tree.items()}
    return Leaf.of(tree) if isinstance(tree, Tensor) else tree


def _has_shapes(value: Any, layout: Mapping[str, Any]) -> bool:
    """Whether these are tensors of the names and shapes of a layout of tensors."""
    return (
        isinstance(value, Mapping)
        and value.keys() == layout.keys()
        and all(isinstance(one, Tensor) for one in value.values())
        and all(tuple(one.shape) == getattr(layout[name], "shape", None) for name, one in value.items())
    )


def _steps_in(inner: Any) -> int:
    """How many steps a rule's state says it has made."""
    if isinstance(inner, Mapping):
        step = inner.get("step")
        if isinstance(step, (int, float)) or (isinstance(step, Tensor) and not step.dim()):
            return int(step)
    return 0


def _fitted(value: Any, expected: Any, path: str, trained: TrainedWeight) -> Any:
    if isinstance(expected, dict):
        if not isinstance(value, Mapping) or value.keys() != expected.keys():
            _refuse_keys(value, expected, path, trained)
        return {key: _fitted(one, expected[key], f"{path}.{key}".strip("."), trained) for key, one in value.items()}
    if isinstance(expected, Leaf):
        return _fitted_tensor(value, expected, path, trained)
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
    return _refuse(trained, f"{path} is {_shown(value)}, where a {type(expected).__name__} is needed")


def _fitted_tensor(value: Any, leaf: Leaf, path: str, trained: TrainedWeight) -> Tensor:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and leaf.shape == ():
        value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    if not isinstance(value, Tensor):
        _refuse(trained, f"{path} is {_shown(value)}, where a tensor of shape {leaf.shape} is needed")
    if tuple(value.shape) != leaf.shape:
        _refuse(trained, f"{path} has shape {tuple(value.shape)}, where {leaf.shape} is needed")
    found = Leaf.of(value)
    if found == leaf:
        return value
    if found.kind is not leaf.kind:
        _refuse(trained, f"{path} is a {found.kind.__name__}, where a {leaf.kind.__name__} is needed")
    if found.dtype != leaf.dtype and not _is_cast_kept(value, leaf.dtype):
        _refuse(trained, f"{path} is {found.dtype}, where {leaf.dtype} is needed")
    made = value.to(device=leaf.device, dtype=leaf.dtype)
    for (name, have), (_, need) in zip(Leaf.of(made).parts, leaf.parts, strict=False):
        if (have.shape, have.dtype) != (need.shape, need.dtype):
            _refuse(trained, f"{path} has {name} of {have.shape}, {have.dtype}; {need.shape}, {need.dtype} is needed")
    return made


def _is_cast_kept(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether a cast is meant: between floating dtypes, or of whole numbers that lose nothing by it."""
    if dtype.is_floating_point:
        return value.is_floating_point()
    if dtype.is_complex or value.is_complex() or value.dtype == torch.bool:
        return False
    return torch.equal(value.to(dtype).to(value.dtype), value)


def _refuse_keys(value: Any, expected: Mapping[str, Any], path: str, trained: TrainedWeight) -> NoReturn:
    where = f"{path} " if path else ""
    if not isinstance(value, Mapping):
        _refuse(trained, f"{where}is {_shown(value)}, where a dictionary of {_names(expected)} is needed")
    if path.startswith(INNER):
        kept_by = next((f", as that of {name} does" for keys, name in KEPT_BY if keys <= value.keys()), "")
        _refuse(
            trained,
            f"it is of another optimizer, or of another setting of it: it holds {_names(value)}{kept_by}, and "
            f"{trained.rule.name} keeps {_names(expected)} here",
        )
    lacks, foreign = expected.keys() - value.keys(), value.keys() - expected.keys()
    parts = [f"lacks {_names(lacks)}"] * bool(lacks) + [f"holds {_names(foreign)}, which mean nothing here"] * bool(
        foreign
    )
    _refuse(trained, f"{where}{' and '.join(parts)}")


def _shown(value: Any) -> str:
    shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return shown if len(shown) < 60 else f"a {type(value).__name__}"


def _names(keys: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, keys))) or "nothing"


def _refuse(trained: TrainedWeight, why: str) -> NoReturn:
    shape = "" if "of shape" in trained.name else f" (a weight of shape {tuple(trained.weight.shape)})"
    raise ValueError(f"the optimizer's state of {trained.name}{shape} does not fit: {why}. {REMEDY}")
