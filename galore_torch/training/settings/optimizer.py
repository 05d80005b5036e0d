"""The optimizer's settings, and what each name that ``--optim`` takes stands for."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from galore_torch.training.settings.adapter import AdapterConfig
from galore_torch.training.settings.fields import check, setting

OF_SOME = frozenset({"beta1", "beta2", "eps", "state_dtype"})
"""Settings that some optimizers have and others do not."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a name that ``--optim`` takes stands for.

    Attributes:
        projected: whether its groups carry the projection's keys.
        heeds: which of `OF_SOME` have an effect on it.
        prunable: whether its state is plain numbers, one for each of the weight's, so that some can be set to zero.
        defaults: settings by name that are its own where nobody says otherwise.
    """

    projected: bool
    heeds: frozenset[str] = frozenset()
    prunable: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_ADAM = frozenset({"beta1", "beta2", "eps"})
_MOMENTUM = frozenset({"beta1"})
_STATE = frozenset({"state_dtype"})
_PROJECTED_DEFAULTS = {"gradients": "fused"}  # as `attach` has it

KINDS: dict[str, Kind] = {
    "galore-adamw": Kind(projected=True, heeds=_ADAM | _STATE),
    "galore-adamw8bit": Kind(projected=True, heeds=_ADAM),
    "qgalore-adamw8bit": Kind(projected=True, heeds=_ADAM, defaults={"basis_bits": 4, "cos_threshold": 0.4}),
    "galore-adafactor": Kind(projected=True, heeds=_STATE, defaults={"state_dtype": "float32"}),
    "galore-sgd": Kind(projected=True, heeds=_MOMENTUM | _STATE),
    "adamw": Kind(projected=False, heeds=_ADAM, prunable=True),
    "adamw8bit": Kind(projected=False, heeds=_ADAM),
    "adafactor": Kind(projected=False),
    "sgd": Kind(projected=False, heeds=_MOMENTUM, prunable=True),
}
"""Every optimizer by the name that ``--optim`` takes; `galore_torch.training.run.optimizers` builds them."""

NAMES = tuple(KINDS)


def is_projected(name: str) -> bool:
    """Whether the optimizer of this name projects."""
    return KINDS[name].projected


def heeds(name: str, setting: str) -> bool:
    """Whether a setting has an effect on the optimizer of this name, of those that not all optimizers have.

    >>> heeds("galore-sgd", "beta1"), heeds("galore-sgd", "beta2"), heeds("galore-sgd", "lr")
    (True, False, True)
    """
    return setting not in OF_SOME or setting in KINDS[name].heeds


def heeding(setting: str) -> list[str]:
    """The optimizers that a setting has an effect on.

    >>> heeding("state_dtype")
    ['galore-adamw', 'galore-adafactor', 'galore-sgd']
    """
    return [name for name in NAMES if heeds(name, setting)]


def own_defaults(name: str) -> Mapping[str, Any]:
    """Settings that are the optimizer's own where nobody says otherwise; none for a name that is not known.

    >>> own_defaults("qgalore-adamw8bit")["basis_bits"]
    4
    """
    kind = KINDS.get(name)
    return {**(_PROJECTED_DEFAULTS if kind.projected else {}), **kind.defaults} if kind else {}


def is_prunable(name: str) -> bool:
    """Whether single numbers of the state of the optimizer of this name can be set to zero."""
    return KINDS[name].prunable


_PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
_DECOMPOSITIONS = ("svd", "randomized", "warm", "random")
DTYPES = ("float32", "bfloat16")
_GRADIENTS = ("full", "projected", "fused")
_UPDATES = ("step", "backward")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What moves the weights."""

    optim: str = setting(
        "galore-adamw",
        f"One of {', '.join(NAMES)}. A galore- optimizer projects the attention's and the MLPs' matrices.",
        choices=NAMES,
    )
    lr: float = setting(0.01, "Peak learning rate.", above=0, shown="by preset and method")
    others_lr: float | None = setting(
        None,
        "Peak learning rate of what is never projected: embeddings, head, norms.",
        above=0,
        shown="the preset's if --lr is not given, else lr",
    )
    rank: int = setting(128, "Rank of the subspace, in dimensions.", minimum=1)
    update_proj_gap: int = setting(200, "Steps between two renewals of a basis.", minimum=1)
    scale: float = setting(0.25, "Factor on the update that comes back from the subspace.", above=0)
    proj_type: str = setting("std", "Which side is projected: std is the shorter one.", choices=_PROJ_TYPES)
    decomposition: str = setting(
        "warm", f"How a basis is found: {', '.join(_DECOMPOSITIONS)}.", choices=_DECOMPOSITIONS
    )
    stagger: bool = setting(True, "Let the layers take turns in renewing, so that no step pays for all.")
    cos_threshold: float | None = setting(
        None,
        "Renew lazily: a layer's gap grows while successive subspaces overlap by this much, from 0 (as random ones do) "
        "to 1; it shrinks again, down to update_proj_gap, where they move.",
        minimum=0,
        maximum=1,
        shown="renew at the fixed gap; qgalore-adamw8bit: 0.4",
    )
    gamma_proj: float = setting(2.0, "Factor by which a lazy layer's gap grows and shrinks.", above=1)
    queue_size: int = setting(5, "How many of a layer's last overlaps are averaged for that.", minimum=1)
    beta1: float = setting(0.9, "Decay of the first moment (momentum, for SGD) per step.", minimum=0, below=1)
    beta2: float = setting(0.999, "Decay of the second moment per step.", minimum=0, below=1)
    eps: float = setting(1e-8, "Added to the root of the second moment.", above=0)
    weight_decay: float = setting(0.0, "Decoupled weight decay per unit of learning rate.", minimum=0)
    max_grad_norm: float = setting(
        0.0,
        "Clip the gradient to this norm; 0 clips nothing.",
        minimum=0,
        shown="0; llama-7b with a full-rank optimizer: 1",
    )
    state_dtype: str | None = setting(
        None,
        f"What the moments are stored in ({', '.join(heeding('state_dtype'))} only).",
        choices=DTYPES,
        shown="as the weights; galore-adafactor: float32",
    )
    basis_bits: int = setting(
        16,
        "Bits of the bases' numbers: 16 (as the weights), 8 or 4 (galore- optimizers only).",
        choices=(16, 8, 4),
        shown="16; qgalore-adamw8bit: 4",
    )
    grad_bits: int = setting(
        16, "Bits of the projected gradients that wait for the step: 16 (as the weights), 8 or 4.", choices=(16, 8, 4)
    )
    gradients: str = setting(
        "full",
        "How gradients are formed (galore- optimizers only): full, projected at once, or fused (never formed).",
        choices=_GRADIENTS,
        shown="fused; full with a full-rank optimizer",
    )
    update: str = setting(
        "step",
        "When gradients are applied: at the step, or layer by layer inside the backward, which leaves nothing to clip "
        "or to accumulate.",
        choices=_UPDATES,
        shown="step; llama-7b with a galore- optimizer: backward",
    )
    weight_bits: int = setting(
        16, "Bits of the projected weights: 16 (as the dtype says) or 8 (galore- optimizers only).", choices=(16, 8)
    )
    weight_rounding: str = setting(
        "stochastic",
        "How INT8 weights are rounded after an update: up or down at random, so that updates smaller than a code "
        "count on average, or to the nearest.",
        choices=("stochastic", "nearest"),
    )

    def __post_init__(self) -> None:
        check(self)
        _refuse_without_projection(self)
        if self.state_dtype is not None and not heeds(self.optim, "state_dtype"):
            raise ValueError(
                f"state_dtype = {self.state_dtype!r} has no effect on {self.optim!r}; leave it out, or choose one "
                f"of {', '.join(heeding('state_dtype'))}."
            )
        if self.weight_bits == 16 and self.weight_rounding == "nearest":
            raise ValueError("weight_rounding = 'nearest' is for weights in few bits; give weight_bits = 8 with it.")
        if self.grad_bits != 16 and (self.gradients == "full" or self.update == "backward"):
            raise ValueError(
                f"grad_bits = {self.grad_bits}, and no projected gradients wait with gradients = {self.gradients!r}, "
                f"update = {self.update!r}; leave it out, or use projected or fused with update = 'step'."
            )
        if self.update == "backward" and self.gradients == "projected":
            raise ValueError("gradients = 'projected' waits for the step; with update = 'backward' use full or fused.")
        if self.update == "backward" and self.max_grad_norm:
            raise ValueError(
                f"max_grad_norm = {self.max_grad_norm} and update = 'backward', which leaves nothing to clip; "
                "give max_grad_norm = 0, or update = 'step'."
            )


PROJECTED_ONLY = (
    "state_dtype",
    "weight_bits",
    "basis_bits",
    "cos_threshold",
    "grad_bits",
    "gradients",
    "weight_rounding",
)
"""Settings that say nothing to an optimizer that does not project, and that are refused with one."""


def _refuse_without_projection(config: OptimizerConfig) -> None:
    """Settings that only an optimizer that projects can heed must be as they are by default for the others."""
    if is_projected(config.optim):
        return
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if each.name in PROJECTED_ONLY and value != each.default:
            raise ValueError(
                f"{each.name} = {value!r} is for the galore- optimizers, not for {config.optim!r}; leave it out."
            )


def refuse_beside_adapter(adapter: AdapterConfig, config: OptimizerConfig) -> None:
    """Refuse an optimizer's settings that an adapter excludes.

    Raises:
        ValueError: when they train the whole matrices or move weights where an adapter cannot follow.
    """
    if adapter.adapter == "none":
        return
    if is_projected(config.optim):
        full_rank = ", ".join(name for name in NAMES if not is_projected(name))
        raise ValueError(
            f"adapter = {adapter.adapter!r} and optim = {config.optim!r}, which projects what has a low rank "
            f"already; choose one of {full_rank} (method = {adapter.adapter!r} does), or adapter = 'none'."
        )
    if config.update == "backward":
        raise ValueError(
            f"update = 'backward' and adapter = {adapter.adapter!r}, whose few gradients wait for the step; leave out "
            "one of them."
        )
    if adapter.adapter == "relora" and 0 < adapter.restart_prune < 1 and not is_prunable(config.optim):
        raise ValueError(
            f"restart_prune = {adapter.restart_prune} would pick numbers from the state of "
            f"optim = {config.optim!r}, which does not keep them one by one; give restart_prune = 1."
        )
