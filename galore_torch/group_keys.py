"""The keys of a projected parameter group, each declared once: type, default, limits, and what it does.

A group with a `rank` is projected. The keys are the ones that Transformers, LLaMA-Factory and Axolotl already pass.
`param_groups`, the optimizers, the Trainer factory and the command line all read this declaration. It imports no torch,
so that ``galore --help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from galore_torch.values import is_number, is_whole, plain

ProjType = Literal["std", "reverse_std", "left", "right", "full"]
Decomposition = Literal["svd", "randomized", "warm", "tracked", "random", "switched", "sampled", "sketched"]
Layout = Literal["tucker", "stack", "reshape"]
BasisBits = Literal[16, 8, 4]
Residual = Literal["fira", "apollo", "alice", "sign", "full"]
Moments = Literal["keep", "rotate", "reset"]
Normalize = Literal["columns", "orthogonal", "blocks"]


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a projected group.

    Attributes:
        default: what a group gets that does not say it; a projected group must say its `rank`.
        help: what it does.
        wanted: the limits, for messages: "use ...".
        choices: the only values, if not every one is allowed.
        whole: whether it is a whole number; without `whole` and `choices`, a number.
        limits: bounds of a number by pydantic's names: ge, gt, le, multiple_of.
        optional: whether it may be None.
        fixed: whether it decides the shapes in the state, so that a checkpoint must agree with it.
    """

    default: Any
    help: str
    wanted: str
    choices: tuple[Any, ...] = ()
    whole: bool = False
    limits: Mapping[str, float] | None = None
    optional: bool = False
    fixed: bool = False

    def accepts(self, value: Any) -> bool:
        """Whether a value is allowed.

        Args:
            value: of any type.
        """
        if value is None:
            return self.optional
        if self.choices:
            return any(type(value) is type(one) and value == one for one in self.choices)
        least, above, most, step = ((self.limits or {}).get(name) for name in ("ge", "gt", "le", "multiple_of"))
        return (
            (is_whole(value) if self.whole else is_number(value))
            and (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
            and (step is None or value % step == 0)
        )


KEYS: Mapping[str, Key] = {
    "rank": Key(
        default=None,
        whole=True,
        limits={"ge": 1},
        wanted="a whole number of at least 1 (a group without it is not projected)",
        help="Rank of the projection; cut to min(m, n).",
        fixed=True,
    ),
    "update_proj_gap": Key(
        default=200,
        whole=True,
        limits={"ge": 1},
        wanted="a whole number of steps of at least 1",
        help="Steps between two renewals of a basis.",
    ),
    "scale": Key(
        default=0.25,
        limits={"gt": 0},
        wanted="a positive number (the paper's is 0.25)",
        help="Factor on the update that comes back from the subspace.",
    ),
    "proj_type": Key(
        default="std",
        choices=get_args(ProjType),
        wanted=f"one of {', '.join(get_args(ProjType))}",
        help="Which side is projected: std is the shorter one; or reverse_std, left, right, full (both).",
        fixed=True,
    ),
    "decomposition": Key(
        default="warm",
        choices=get_args(Decomposition),
        wanted=f"one of {', '.join(get_args(Decomposition))}",
        help="How a basis is found: warm (two power iterations from the old one), tracked (one, for gaps of 1 to 10), "
        "randomized, svd (exact), random, switched (half of it warm, half random), sampled (singular vectors drawn "
        "by their values), or sketched (from random combinations of columns, which DDP averages, not the gradient).",
    ),
    "stagger": Key(
        default=True,
        choices=(True, False),
        wanted="True or False",
        help="Layers take turns to renew, so that no step pays for all.",
    ),
    "layout": Key(
        default="tucker",
        choices=get_args(Layout),
        wanted=f"one of {', '.join(get_args(Layout))}",
        help="How weights of more than two dimensions are projected: tucker, stack (experts), or reshape.",
        fixed=True,
    ),
    "basis_bits": Key(
        default=16,
        choices=get_args(BasisBits),
        wanted="16 (the weight's dtype), 8 or 4",
        help="Bits of the bases' numbers: 16 (the weight's dtype), 8 or 4.",
        fixed=True,
    ),
    "basis_group_size": Key(
        default=256,
        whole=True,
        limits={"ge": 2, "multiple_of": 2},
        wanted="an even whole number, such as 256",
        help="Numbers of a basis in 8 or 4 bits that share a range; even.",
        fixed=True,
    ),
    "cos_threshold": Key(
        default=None,
        optional=True,
        limits={"ge": 0, "le": 1},
        wanted="an overlap from 0 (as of random subspaces) to 1, or None to renew every update_proj_gap steps",
        help="Renew lazily: a layer's gap grows while successive subspaces overlap by this much, from 0 (as random "
        "ones do) to 1; it shrinks again, down to update_proj_gap, where they move.",
    ),
    "gamma_proj": Key(
        default=2,
        limits={"gt": 1},
        wanted="a factor of more than 1, by which a lazy layer's gap grows",
        help="Factor by which a lazy layer's gap grows and shrinks.",
    ),
    "queue_size": Key(
        default=5,
        whole=True,
        limits={"ge": 1},
        wanted="a whole number of renewals of at least 1",
        help="How many of a layer's last overlaps are averaged for that.",
    ),
    "residual": Key(
        default=None,
        choices=get_args(Residual),
        optional=True,
        wanted=f"one of {', '.join(get_args(Residual))}, or None to drop it",
        help="What becomes of the gradient's part outside the subspace: nothing, or it is scaled as fira, apollo or "
        "alice do, enters by its signs, or in full. Wants full gradients.",
    ),
    "residual_scale": Key(
        default=1.0,
        limits={"gt": 0},
        wanted="a positive number",
        help="Factor on the residual, beside the update in the subspace; 1 / (1 - momentum) lets it weigh as SGD's.",
    ),
    "moments": Key(
        default="keep",
        choices=get_args(Moments),
        wanted=f"one of {', '.join(get_args(Moments))}",
        help="What becomes of the optimizer's state when a basis is renewed: keep the numbers, rotate them into the "
        "new basis, or reset them.",
    ),
    "normalize": Key(
        default=None,
        choices=get_args(Normalize),
        optional=True,
        wanted=f"one of {', '.join(get_args(Normalize))}, or None",
        help="Gives updates a fixed size: columns (one norm an input feature), orthogonal (Newton-Schulz) or blocks "
        "(that of twice rank rows at a time). Entries are then about 1, times lr and scale (0.2 is as AdamW's).",
    ),
}
"""By their names. Gap and scale are the paper's, those of lazy layers Q-GaLore's."""

PROJECTED_DEFAULTS: dict[str, Any] = {name: key.default for name, key in KEYS.items() if name != "rank"}
"""Defaults of the keys of a group with a `rank`."""

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
        from galore_torch.messages import did_you_mean  # which imports torch

        raise ValueError(f"{name}={value!r} is no key of a projected group; {did_you_mean(name, KEYS)}")
    value = plain(value)
    if not KEYS[name].accepts(value):
        raise ValueError(f"{name} is {value!r}; use {KEYS[name].wanted}")
    return value
