"""The keys of a projected parameter group, each declared once: name, default, limits, and what it does.

A group with a `rank` is projected. The keys are the ones that Transformers, LLaMA-Factory and Axolotl already pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from galore_torch.lowbit import BITS
from galore_torch.messages import did_you_mean
from galore_torch.projection import DECOMPOSITIONS, LAYOUTS, PROJ_TYPES
from galore_torch.values import is_number, is_whole, plain


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a projected group.

    Attributes:
        default: what a group gets that does not say it; a projected group must say its `rank`.
        accepts: whether a value can be served.
        wanted: the limits, for messages: "use ...".
        help: what it does.
        fixed: whether it decides the shapes in the state, so that a checkpoint must agree with it.
    """

    default: Any
    accepts: Callable[[Any], bool]
    wanted: str
    help: str
    fixed: bool = False


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(one) and value == one for one in values)


KEYS: Mapping[str, Key] = {
    "rank": Key(
        default=None,
        accepts=is_whole,
        wanted="a whole number of at least 1 (a group without it is not projected)",
        help="rank of the projection; cut to min(m, n)",
        fixed=True,
    ),
    "update_proj_gap": Key(
        default=200,
        accepts=is_whole,
        wanted="a whole number of steps of at least 1",
        help="steps between two renewals of a basis",
    ),
    "scale": Key(
        default=0.25,
        accepts=lambda value: is_number(value) and value > 0,
        wanted="a positive number (the paper's is 0.25)",
        help="factor of the projected update",
    ),
    "proj_type": Key(
        default="std",
        accepts=_one_of(*PROJ_TYPES),
        wanted=f"one of {', '.join(PROJ_TYPES)}",
        help="the shorter side; `reverse_std`, `left`, `right`, `full`",
        fixed=True,
    ),
    "decomposition": Key(
        default="warm",
        accepts=lambda value: isinstance(value, str) and value in DECOMPOSITIONS,
        wanted=f"one of {', '.join(DECOMPOSITIONS)}",
        help="two power iterations from the old basis; `randomized`, `svd` (exact), `random`",
    ),
    "stagger": Key(
        default=True,
        accepts=lambda value: isinstance(value, bool),
        wanted="True or False",
        help="layers take turns to renew, so that no step pays for all",
    ),
    "layout": Key(
        default="tucker",
        accepts=_one_of(*LAYOUTS),
        wanted=f"one of {', '.join(LAYOUTS)}",
        help="of weights of more than two dimensions; `stack` (experts), `reshape`",
        fixed=True,
    ),
    "basis_bits": Key(
        default=16,
        accepts=_one_of(16, *BITS),
        wanted="16 (the weight's dtype), 8 or 4",
        help="16: bases have the weight's dtype; 8, 4: codes",
        fixed=True,
    ),
    "basis_group_size": Key(
        default=256,
        accepts=lambda value: is_whole(value, 2) and value % 2 == 0,
        wanted="an even whole number, such as 256",
        help="numbers of such a basis that share a range",
        fixed=True,
    ),
    "cos_threshold": Key(
        default=None,
        accepts=lambda value: value is None or (is_number(value) and 0 <= value <= 1),
        wanted="an overlap from 0 (as of random subspaces) to 1, or None to renew every update_proj_gap steps",
        help="overlap of successive subspaces from which on a layer's gap grows",
    ),
    "gamma_proj": Key(
        default=2,
        accepts=lambda value: is_number(value) and value > 1,
        wanted="a factor of more than 1, by which a lazy layer's gap grows",
        help="factor by which a lazy layer's gap grows, and shrinks again where its subspace moves",
    ),
    "queue_size": Key(
        default=5,
        accepts=is_whole,
        wanted="a whole number of renewals of at least 1",
        help="how many of the last overlaps are averaged",
    ),
}
"""By their names. Gap and scale are the paper's, the last two as Q-GaLore's."""

PROJECTED_DEFAULTS: dict[str, Any] = {name: key.default for name, key in KEYS.items() if name != "rank"}
"""What a group with a `rank` gets where it says nothing."""

FIXED_KEYS = tuple(name for name, key in KEYS.items() if key.fixed)
"""Keys that decide the shapes in the state, so that a checkpoint must agree with them."""


def checked_key(name: str, value: Any) -> Any:
    """A key's value, as a group holds it.

    Args:
        name: one of `KEYS`.
        value: what was given.

    Returns:
        The value; numpy's numbers as Python's.

    Raises:
        ValueError: an unknown name, or a value out of range. The message names both, and the remedy.

    Example:
        >>> checked_key("rank", 8)
        8
    """
    if name not in KEYS:
        raise ValueError(f"{name}={value!r} is no key of a projected group; {did_you_mean(name, KEYS)}")
    value = plain(value)
    if not KEYS[name].accepts(value):
        raise ValueError(f"{name} is {value!r}; use {KEYS[name].wanted}")
    return value
