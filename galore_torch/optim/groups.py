"""The keys of a projected parameter group: their defaults, their checks, and the names of its parameters.

A group with a `rank` is projected. The keys are the ones that Transformers, LLaMA-Factory and Axolotl already pass.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from galore_torch.lowbit import BITS, Storage, check_bits
from galore_torch.optim.quantize import require_current
from galore_torch.projection import DECOMPOSITIONS, Projection

PROJECTED_DEFAULTS: dict[str, Any] = {
    "update_proj_gap": 200,
    "scale": 0.25,
    "proj_type": "std",
    "decomposition": "warm",
    "stagger": True,
    "layout": "tucker",
    "basis_bits": 16,
    "basis_group_size": 256,
    "cos_threshold": None,
    "gamma_proj": 2,
    "queue_size": 5,
}
"""What a group with a `rank` gets where it says nothing: gap and scale as the paper's, the last two as Q-GaLore's."""

FIXED_KEYS = ("rank", "proj_type", "layout", "basis_bits", "basis_group_size")
"""Keys that decide the shapes in the state, so that a checkpoint must agree with them."""

projection_of = functools.lru_cache(maxsize=None, typed=True)(Projection.of)  # typed: 4.0 and True are no ranks
identity_of = functools.lru_cache(maxsize=None)(Projection.identity)
_storage_of = functools.lru_cache(maxsize=None)(Storage)


def is_projected(group: Mapping[str, Any]) -> bool:
    """Whether the parameters of a group are projected."""
    return "rank" in group


def parameter_name(group: Mapping[str, Any], index: int) -> str:
    """What to call a parameter in a message: its name if the group has names, else its place and shape."""
    names = group.get("param_names")
    if names is not None:
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
        if id(parameter) in seen:
            raise ValueError(f"{parameter_name(group, index)} is listed twice in one parameter group; list it once")
        seen.add(id(parameter))
        require_current(parameter)
    if not is_projected(group):
        return
    if not group["params"]:
        raise ValueError(f"the projected group (rank {group['rank']!r}) has no parameters; check your target modules")
    for key, default in PROJECTED_DEFAULTS.items():
        group.setdefault(key, default)
    gap = group["update_proj_gap"]
    if isinstance(gap, bool) or not isinstance(gap, int) or gap < 1:
        raise ValueError(f"update_proj_gap is {gap!r}; use a whole number of steps of at least 1")
    if not isinstance(group["scale"], (int, float)) or not 0 < group["scale"] < float("inf"):
        raise ValueError(f"scale is {group['scale']!r}; use a positive number (the paper's is 0.25)")
    if group["decomposition"] not in DECOMPOSITIONS:
        raise ValueError(f"decomposition is {group['decomposition']!r}; use one of {', '.join(DECOMPOSITIONS)}")
    if not isinstance(group["stagger"], bool):
        raise ValueError(f"stagger is {group['stagger']!r}; use True or False")
    _check_storage(group)
    _check_laziness(group)
    _check_projections(group)


def _check_storage(group: Mapping[str, Any]) -> None:
    bits = group["basis_bits"]
    if isinstance(bits, bool) or bits not in (16, *BITS):
        raise ValueError(f"basis_bits is {bits!r}; use 16 (the weight's dtype), 8 or 4")
    try:
        check_bits(BITS[0], group["basis_group_size"])
    except ValueError as error:
        raise ValueError(f"basis_{error}") from None


def _check_laziness(group: Mapping[str, Any]) -> None:
    threshold, factor, size = group["cos_threshold"], group["gamma_proj"], group["queue_size"]
    if threshold is not None and not (_is_number(threshold) and 0 <= threshold <= 1):
        raise ValueError(
            f"cos_threshold is {threshold!r}; use an overlap from 0 (as of random subspaces) to 1 (the same), or None "
            "to renew every update_proj_gap steps"
        )
    if not (_is_number(factor) and 1 < factor < float("inf")):
        raise ValueError(f"gamma_proj is {factor!r}; use a factor of more than 1, by which a lazy layer's gap grows")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"queue_size is {size!r}; use a whole number of renewals of at least 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_projections(group: Mapping[str, Any]) -> None:
    wasteful = []
    for index, weight in enumerate(group["params"]):
        name = parameter_name(group, index)
        try:
            projection = projection_of(weight.shape, group["rank"], group["proj_type"], group["layout"])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if weight.is_complex() or not weight.is_floating_point():
            raise ValueError(f"{name} is {weight.dtype}; only real floating-point weights can be projected")
        if projection.saves_nothing:
            wasteful.append(name)
    if wasteful:
        shown = ", ".join(wasteful[:3]) + (", ..." if len(wasteful) > 3 else "")
        warnings.warn(
            f"rank {group['rank']} saves no memory for {len(wasteful)} of {len(group['params'])} projected weights "
            f"({shown}): basis and moments take as much as plain ones. Lower the rank, or leave them out of the group",
            stacklevel=2,
        )


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
