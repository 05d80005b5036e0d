"""The optimizer's settings, and what each name that ``--optim`` takes stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, get_args

from galore_torch.extras import install
from galore_torch.group_keys import KEYS, BasisBits, Decomposition, Layout, Moments, Normalize, ProjType, Residual
from galore_torch.training.settings.fields import DType, field_names, group_setting, require_defaults, setting, settings

Optim = Literal[
    "galore-adamw", "galore-adamw8bit", "qgalore-adamw8bit", "galore-adafactor", "galore-muon", "galore-sgd",
    "adamw", "adamw8bit", "adafactor", "sgd",
]  # fmt: skip
NAMES: tuple[str, ...] = get_args(Optim)

MATRICES = r".+\.\d+\..+"
"""Which modules' linear weights are meant by matrices: those in a numbered layer, the attention's and the MLP's however
they are called. By the rules of `galore_torch.param_groups`."""


def modules_named(names: str) -> str | list[str]:
    """The modules that a setting names: parts of their names by comma, or all-linear."""
    return names if names == "all-linear" else [name.strip() for name in names.split(",")]


@dataclass(frozen=True)
class Kind:
    """What a name that ``--optim`` takes stands for."""

    made_by: str  # its class, as `pkgutil.resolve_name` reads it: no library is imported before it is needed
    settings: frozenset[str] = frozenset()  # that have an effect on it and none on some, beside the projection's
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of its class, that no setting has
    prunable: bool = False  # its state is plain numbers, one for each of the weight's: some can be set to zero
    # A learning rate alone says how far matrices move, so that rates of others do not suit it; of them it keeps one
    # momentum.
    fixed_size: bool = False
    eight_bit: bool = False  # its state is that of bitsandbytes
    own: Mapping[str, Any] = field(default_factory=dict)  # settings where nobody says otherwise; see `defaults`

    @property
    def projected(self) -> bool:
        """Whether its groups carry the projection's keys."""
        return self.made_by.startswith("galore_torch:")

    @property
    def defaults(self) -> dict[str, Any]:
        """Settings by name that it has where nobody says otherwise: gradients are formed as `attach` has it."""
        return {**({"gradients": "fused"} if self.projected else {}), **self.own}


_MOMENTUM, _ADAM, _STATE = frozenset({"beta1"}), frozenset({"beta1", "beta2", "eps"}), frozenset({"state_dtype"})
_OTHERS = frozenset({"others_bits"})
_PROJECTED = frozenset(KEYS) | {
    "gradients",
    "grad_bits",
    "save_inputs",
    "weight_bits",
    "weight_rounding",
    "rank_pattern",
}
_FEW_BITS = {"basis_bits": 4, "cos_threshold": 0.4}
_MUON = {
    "gradients": "full",
    "scale": 0.2,
    "residual": "full",
    "residual_scale": 10.0,
    "moments": "rotate",
    "normalize": "orthogonal",
}
_UNSCALED = {"scale_parameter": False, "relative_step": False}  # an Adafactor by the learning rate alone

KINDS: dict[str, Kind] = {
    "galore-adamw": Kind("galore_torch:GaLoreAdamW", _ADAM | _STATE | _OTHERS),
    "galore-adamw8bit": Kind("galore_torch:GaLoreAdamW8bit", _ADAM, eight_bit=True),
    "qgalore-adamw8bit": Kind("galore_torch:QGaLoreAdamW8bit", _ADAM, eight_bit=True, own=_FEW_BITS),
    "galore-adafactor": Kind(
        "galore_torch:GaLoreAdafactor", _STATE, arguments=_UNSCALED, own={"state_dtype": "float32"}
    ),
    "galore-muon": Kind("galore_torch:GaLoreMuon", _ADAM | _STATE | _OTHERS, fixed_size=True, own=_MUON),
    "galore-sgd": Kind("galore_torch:GaLoreSGD", _MOMENTUM | _STATE),
    "adamw": Kind("torch.optim:AdamW", _ADAM, arguments={"fused": True}, prunable=True),
    "adamw8bit": Kind("bitsandbytes.optim:AdamW8bit", _ADAM, eight_bit=True),
    "adafactor": Kind("transformers:Adafactor", arguments=_UNSCALED),
    "sgd": Kind("torch.optim:SGD", _MOMENTUM, prunable=True),
}
"""Every optimizer by the name that ``--optim`` takes; `galore_torch.training.run.optimizers` builds them."""

UNKNOWN = Kind("")
"""What a name stands for that `OptimizerConfig` will refuse."""

# Without an effect, these are let pass: presets and runs that are compared share them.
_SHARED = {"rank", "update_proj_gap", "scale", "proj_type", "decomposition", "stagger", "gamma_proj", "queue_size"}
_SHARED |= _ADAM


def has_effect(name: str, optim: str) -> bool:
    """Whether a setting has an effect on the optimizer of this name.

    >>> has_effect("beta1", "galore-sgd"), has_effect("beta2", "galore-sgd"), has_effect("rank", "adamw")
    (True, False, False)
    """
    if name in _PROJECTED:
        return KINDS[optim].projected
    return name not in _ADAM | _STATE | _OTHERS or name in KINDS[optim].settings


def missing_library(optim: str, others_bits: int | None = None) -> str | None:
    """Which library an optimizer needs that is not installed, with how to install it; None where it needs none."""
    if KINDS[optim].eight_bit and find_spec("bitsandbytes") is None:
        return f"optim = {optim!r} needs bitsandbytes. {install('bnb')}"
    if others_bits is not None and find_spec("torchao") is None:
        return f"others_bits = {others_bits} needs torchao. {install('torchao')}"
    return None


def optimizers_with(name: str) -> list[str]:
    """The optimizers that a setting has an effect on.

    >>> optimizers_with("state_dtype")
    ['galore-adamw', 'galore-adafactor', 'galore-muon', 'galore-sgd']
    """
    return [optim for optim in NAMES if has_effect(name, optim)]


@settings
class OptimizerConfig:
    """What moves the weights."""

    optim: Optim = setting(
        "galore-adamw",
        f"One of {', '.join(NAMES)}. A galore- optimizer projects the attention's and the MLPs' matrices.",
    )
    lr: float = setting(0.01, "Peak learning rate.", gt=0, default_help="by preset and method")
    others_lr: float | None = setting(
        None,
        "Peak learning rate of what is never projected: embeddings, head, norms.",
        gt=0,
        default_help="the preset's if --lr is not given, else lr",
    )
    rank: int = group_setting("rank", default=128)
    rank_pattern: str | None = setting(
        None,
        "Ranks of modules, by the ends of their names, such as q_proj=32,mlp.down_proj=64: galore inspect gives one. "
        "Others have --rank.",
    )
    update_proj_gap: int = group_setting("update_proj_gap")
    scale: float = group_setting("scale", default_help="0.25 or by preset; galore-muon: 0.2")
    proj_type: ProjType = group_setting("proj_type")
    decomposition: Decomposition = group_setting("decomposition")
    stagger: bool = group_setting("stagger")
    layout: Layout = group_setting("layout")
    basis_bits: BasisBits = group_setting("basis_bits", default_help="16; qgalore-adamw8bit: 4")
    basis_group_size: int = group_setting("basis_group_size")
    cos_threshold: float | None = group_setting(
        "cos_threshold", default_help="renew at the fixed gap; qgalore-adamw8bit: 0.4"
    )
    gamma_proj: float = group_setting("gamma_proj")
    queue_size: int = group_setting("queue_size")
    residual: Residual | Literal["none"] | None = group_setting(
        "residual", default_help="none, dropped; galore-muon: full"
    )
    residual_scale: float = group_setting("residual_scale", default_help="1; galore-muon: 10")
    moments: Moments = group_setting("moments", default_help="keep; galore-muon: rotate")
    normalize: Normalize | None = group_setting("normalize", default_help="as it is; galore-muon: orthogonal")
    beta1: float = setting(0.9, "Decay of the first moment (momentum, for SGD) per step.", ge=0, lt=1)
    beta2: float = setting(0.999, "Decay of the second moment per step.", ge=0, lt=1)
    eps: float = setting(1e-8, "Added to the root of the second moment.", gt=0)
    weight_decay: float = setting(0.0, "Decoupled weight decay per unit of learning rate.", ge=0)
    max_grad_norm: float = setting(
        0.0,
        "Clip the gradient to this norm; 0 clips nothing.",
        ge=0,
        default_help="0; llama-7b with a full-rank optimizer: 1",
    )
    state_dtype: DType | None = setting(
        None,
        f"What the moments are stored in ({', '.join(optimizers_with('state_dtype'))} only).",
        default_help="as the weights; galore-adafactor: float32",
    )
    others_bits: Literal[8, 4] | None = setting(
        None,
        "Bits of the moments of what is never projected, by torchao's AdamW "
        f"({', '.join(optimizers_with('others_bits'))} only).",
        default_help="as AdamW keeps them",
    )
    grad_bits: Literal[16, 8, 4] = setting(
        16, "Bits of the projected gradients that wait for the step: 16 (as the weights), 8 or 4."
    )
    save_inputs: Literal["full", "projected", "sampled"] = setting(
        "projected",
        "What fused layers keep of their inputs for the backward: projected where that loses nothing, sampled (every "
        "fourth token of the others, for gradients that are right on average), or full.",
    )
    gradients: Literal["full", "projected", "fused"] = setting(
        "full",
        "How gradients are formed (galore- optimizers only): full, projected at once, or fused (never formed).",
        default_help="fused; full with a full-rank optimizer and with galore-muon",
    )
    update: Literal["step", "backward"] = setting(
        "step",
        "When gradients are applied: at the step, or layer by layer inside the backward, which leaves nothing to clip "
        "or to accumulate.",
        default_help="step; llama-7b with a galore- optimizer: backward",
    )
    weight_bits: Literal[16, 8] = setting(
        16, "Bits of the projected weights: 16 (as the dtype says) or 8 (galore- optimizers only)."
    )
    weight_rounding: Literal["stochastic", "nearest"] = setting(
        "stochastic",
        "How INT8 weights are rounded after an update: up or down at random, so that updates smaller than a code "
        "count on average, or to the nearest.",
    )

    def __post_init__(self) -> None:
        judged = [name for name in field_names(OptimizerConfig) if name not in _SHARED]
        require_defaults(self, "optim", {name: optimizers_with(name) for name in judged})
        if self.residual not in (None, "none") and self.gradients != "full" and KINDS[self.optim].projected:
            raise ValueError(
                f"gradients = {self.gradients!r} keeps projected gradients alone, and residual = {self.residual!r} "
                "needs the full ones; give gradients = 'full', or residual = 'none'."
            )
        if self.weight_bits == 16 and self.weight_rounding == "nearest":
            raise ValueError("weight_rounding = 'nearest' has no effect with weight_bits = 16; give weight_bits = 8.")
        if not all(re.fullmatch(r"[^\s=]+=[1-9]\d*", one) for one in self._ranks()):
            raise ValueError(
                f"rank_pattern = {self.rank_pattern!r} is no list of ranks; give such as q_proj=32,mlp.down_proj=64."
            )
        if len(self.ranks) < len(self._ranks()):
            raise ValueError(f"rank_pattern = {self.rank_pattern!r} has a name twice; give one rank for each.")

    def _ranks(self) -> list[str]:
        return [] if self.rank_pattern is None else self.rank_pattern.replace(" ", "").split(",")

    @property
    def ranks(self) -> dict[str, int]:
        """The ranks of `rank_pattern` by the ends of names.

        >>> OptimizerConfig(rank_pattern="q_proj=32,mlp.down_proj=64").ranks
        {'q_proj': 32, 'mlp.down_proj': 64}
        """
        return {name: int(rank) for name, _, rank in (one.partition("=") for one in self._ranks())}

    @property
    def group_keys(self) -> dict[str, Any]:
        """What a projected parameter group gets, by the names of `galore_torch.group_keys.KEYS`."""
        # "none" is how a flag and a file of settings say None against an optimizer that has a residual of its own.
        return {name: getattr(self, name) for name in KEYS} | {
            "residual": None if self.residual == "none" else self.residual
        }
