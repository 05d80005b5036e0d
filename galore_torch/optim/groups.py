"""What is checked of a parameter group before an optimizer takes it, and the names of its parameters.

A group with a `rank` is projected; `keys` declares what else it may say.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from galore_torch.group_keys import FIXED_KEYS, KEYS, PROJECTED_DEFAULTS, checked_key
from galore_torch.lowbit import QuantizedWeight, Storage
from galore_torch.projection import Projection
from galore_torch.values import plain

projection_of = functools.lru_cache(maxsize=None, typed=True)(Projection.of)  # typed: 4.0 and True are no ranks
identity_of = functools.lru_cache(maxsize=None)(Projection.identity)
_storage_of = functools.lru_cache(maxsize=None)(Storage)


def is_projected(group: Mapping[str, Any]) -> bool:
    """Whether the parameters of a group are projected."""
    return "rank" in group


def parameter_name(group: Mapping[str, Any], index: int) -> str:
    """What to call a parameter in a message: its name if the group has one for each, else its place and shape."""
    names = group.get("param_names")
    if names is not None and len(names) == len(group["params"]):  # a user may have taken a parameter out, not its name
        return str(names[index])
    return f"parameter {index} of its group, of shape {tuple(group['params'][index].shape)}"


def projection_in(group: Mapping[str, Any], weight: Tensor) -> Projection:
    """How a group projects a weight; the identity for a group without a `rank`."""
    if not is_projected(group):
        return identity_of(weight.shape)
    return projection_of(weight.shape, group["rank"], group["proj_type"], group["layout"])


def storage_in(group: Mapping[str, Any]) -> Storage:
    """What the bases of a group are kept in."""
    return _storage_of(bits=group.get("basis_bits", 16), group_size=group.get("basis_group_size", 256))


def is_trainable(weight: Tensor) -> bool:
    """Whether a weight can ever be trained: frozen codes of a quantized layer cannot, and frozen numbers may later.

    Args:
        weight: a parameter.
    """
    return weight.requires_grad or weight.is_floating_point() or weight.is_complex()


def check_group(group: dict[str, Any]) -> None:
    """Checks a group before the optimizer takes it, and fills in the keys of a projected one.

    Args:
        group: with a list of tensors as `params`; changed in place.

    Raises:
        ValueError: a parameter listed twice or replaced, an empty projected group, or a value out of range. The message
            names the field, the value and the remedy.
    """
    seen: set[int] = set()
    for index, parameter in enumerate(group["params"]):
        _check_parameter(group, index, parameter)
        if id(parameter) in seen:
            raise ValueError(f"{parameter_name(group, index)} is listed twice in one parameter group; list it once")
        seen.add(id(parameter))
        require_current(parameter)
    group |= {key: plain(value) for key, value in group.items() if key not in ("params", "param_names")}
    if not is_projected(group):
        return
    if not group["params"]:
        raise ValueError(f"the projected group (rank {group['rank']!r}) has no parameters; check your target modules")
    check_keys(group)
    _check_projections(group)


def check_keys(group: dict[str, Any]) -> None:
    """Checks the keys of a projected group, and fills in those that it lacks.

    Args:
        group: changed in place.

    Raises:
        ValueError: one has a value that is not allowed.
    """
    if is_projected(group):
        group |= {key: checked_key(key, group.get(key, declared.default)) for key, declared in KEYS.items()}


def require_current(weight: Tensor) -> None:
    """Checks that a weight has not been replaced, by `quantize_weights` or `fully_shard`.

    Args:
        weight: a parameter that an optimizer holds.

    Raises:
        ValueError: it has been; the message says what to do.
    """
    if not weight.__dict__:  # what replaces a weight writes into it (`lowbit.taken_over`)
        return
    if not isinstance(weight, QuantizedWeight) and hasattr(weight, "_fsdp_orig_uid"):  # which raises for codes
        raise ValueError(
            f"the optimizer holds a weight of shape {tuple(weight.shape)} that is not in the model any more: "
            "fully_shard has replaced it by its shard, and training it would change nothing. Make the optimizer after "
            "fully_shard"
        )
    by = getattr(weight, "_replaced_by", None)
    if by is not None:
        raise ValueError(
            f"the optimizer holds a weight that is not in the model any more: it was replaced by {by}. Make the "
            "optimizer after quantize_weights or dequantize_weights"
        )


def _check_parameter(group: Mapping[str, Any], index: int, parameter: Any) -> None:
    if not isinstance(parameter, Tensor):
        raise ValueError(
            f"params[{index}] of a parameter group is {parameter!r}, a {type(parameter).__name__}; list parameters, or "
            "(name, parameter) pairs for all of them"
        )
    if parameter.requires_grad and _is_expanded(parameter):
        raise ValueError(
            f"{parameter_name(group, index)} is expanded: several of its numbers are one in memory, so that it cannot "
            "be trained; pass nn.Parameter(weight.clone())"
        )
    if not parameter.is_leaf and not parameter.retains_grad:
        raise ValueError(
            f"{parameter_name(group, index)} was computed from other tensors, so that it gets no gradient; pass the "
            "nn.Parameter itself, or its .detach().requires_grad_()"
        )


def _is_expanded(weight: Tensor) -> bool:
    """Whether several of a weight's numbers are one in memory, so that it cannot be written to."""
    pairs = zip(weight.shape, weight.stride(), strict=True) if weight.layout is torch.strided else ()
    return any(size > 1 and stride == 0 for size, stride in pairs)


def _check_projections(group: Mapping[str, Any]) -> None:
    for index, weight in enumerate(group["params"]):
        name = parameter_name(group, index)
        if weight.is_complex() or (weight.requires_grad and not weight.is_floating_point()):
            raise ValueError(
                f"{name} is {weight.dtype}; only real floating-point weights can be projected. Put it in a group "
                "without `rank`"
            )
        if weight.requires_grad and weight.element_size() < 2:
            raise ValueError(
                f"{name} is {weight.dtype}, in which nothing can be computed; use 16 bits or more, or INT8 weights "
                "(quantize_weights)"
            )
        try:
            projection_of(weight.shape, group["rank"], group["proj_type"], group["layout"])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def check_same_geometry(current: Mapping[str, Any], saved: Mapping[str, Any], index: int) -> None:
    """Checks that a checkpoint's group has the shapes of ours.

    Args:
        current: the optimizer's group.
        saved: the checkpoint's.
        index: which group it is, for the message.

    Raises:
        ValueError: one of `FIXED_KEYS` differs.
    """
    held = f"{parameter_name(current, 0)} first" if current["params"] else "empty"
    for key in FIXED_KEYS:
        ours, theirs = current.get(key), saved.get(key, PROJECTED_DEFAULTS.get(key) if key in current else None)
        if ours != theirs:
            raise ValueError(
                f"parameter group {index} ({held}) has {key}={ours!r}, the checkpoint has {key}={theirs!r}. Build "
                f"the optimizer with {key}={theirs!r} to resume, or do not load the optimizer's state to start it anew"
            )
