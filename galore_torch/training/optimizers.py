"""Which optimizer a name stands for, and the factory through which Transformers' Trainer makes it.

Every entry is fed the same parameter groups: first the matrices (the attention's and the MLPs' linear weights, which
GaLore projects), then the others (embeddings, head, norms), whose learning rate may differ. A full-rank optimizer gets
the same groups without the projection's keys, so that "matrices" and "others" mean one thing in every comparison.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import Optimizer

    from galore_torch.training.config import OptimizerConfig

Groups = list[dict[str, Any]]

MATRICES = ("attn", "mlp")
"""Parts of the names of the modules whose linear weights are meant by matrices; see `galore_torch.param_groups`."""


OF_SOME = frozenset({"beta1", "beta2", "eps", "state_dtype"})
"""Settings that some optimizers have and others do not."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One optimizer that ``--optimizer`` can name.

    Attributes:
        build: makes it from the parameter groups, the settings and the run's seed.
        projected: whether its groups carry the projection's keys.
        heeds: which of `OF_SOME` have an effect on it.
        prunable: whether its state is plain numbers, one for each of the weight's, so that some can be set to zero.
        defaults: settings by name that are its own where nobody says otherwise.
    """

    build: Callable[[Groups, OptimizerConfig, int], Optimizer]
    projected: bool
    heeds: frozenset[str]
    prunable: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _adam(config: OptimizerConfig) -> dict[str, Any]:
    """What every Adam takes, by the names that torch, bitsandbytes and ours share."""
    return {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }


def _state_dtype(config: OptimizerConfig) -> dict[str, Any]:
    """What the moments are stored in, if it is said."""
    import torch

    return {} if config.state_dtype is None else {"state_dtype": getattr(torch, config.state_dtype)}


def _galore_adamw(groups: Groups, config: OptimizerConfig, seed: int) -> Optimizer:
    from galore_torch import GaLoreAdamW

    return GaLoreAdamW(groups, **_adam(config), **_state_dtype(config), seed=seed)


def _galore_adamw8bit(groups: Groups, config: OptimizerConfig, seed: int) -> Optimizer:
    from galore_torch import GaLoreAdamW8bit

    return GaLoreAdamW8bit(groups, **_adam(config), seed=seed)


def _qgalore_adamw8bit(groups: Groups, config: OptimizerConfig, seed: int) -> Optimizer:
    from galore_torch import QGaLoreAdamW8bit

    # Said here, for its groups take a value that is GaLore's own default for one that nobody said.
    return QGaLoreAdamW8bit(
        groups, **_adam(config), basis_bits=config.basis_bits, cos_threshold=config.cos_threshold, seed=seed
    )


def _galore_adafactor(groups: Groups, config: OptimizerConfig, seed: int) -> Optimizer:
    from galore_torch import GaLoreAdafactor

    return GaLoreAdafactor(
        groups,
        lr=config.lr,
        weight_decay=config.weight_decay,
        scale_parameter=False,
        relative_step=False,
        seed=seed,
        **_state_dtype(config),
    )


def _galore_sgd(groups: Groups, config: OptimizerConfig, seed: int) -> Optimizer:
    from galore_torch import GaLoreSGD

    return GaLoreSGD(
        groups,
        lr=config.lr,
        momentum=config.beta1,
        weight_decay=config.weight_decay,
        seed=seed,
        **_state_dtype(config),
    )


def _adamw(groups: Groups, config: OptimizerConfig, _seed: int) -> Optimizer:
    import torch

    return torch.optim.AdamW(groups, **_adam(config), fused=True)


def _adamw8bit(groups: Groups, config: OptimizerConfig, _seed: int) -> Optimizer:
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(groups, **_adam(config))  # type: ignore[no-untyped-call]


def _adafactor(groups: Groups, config: OptimizerConfig, _seed: int) -> Optimizer:
    from transformers import Adafactor

    return Adafactor(  # type: ignore[no-untyped-call]
        groups, lr=config.lr, weight_decay=config.weight_decay, scale_parameter=False, relative_step=False
    )


def _sgd(groups: Groups, config: OptimizerConfig, _seed: int) -> Optimizer:
    import torch

    return torch.optim.SGD(groups, lr=config.lr, momentum=config.beta1, weight_decay=config.weight_decay)


_NONE: frozenset[str] = frozenset()
_ADAM = frozenset({"beta1", "beta2", "eps"})
_MOMENTUM = frozenset({"beta1"})
_STATE = frozenset({"state_dtype"})

REGISTRY: dict[str, Entry] = {
    "galore-adamw": Entry(build=_galore_adamw, projected=True, heeds=_ADAM | _STATE),
    "galore-adamw8bit": Entry(build=_galore_adamw8bit, projected=True, heeds=_ADAM),
    "qgalore-adamw8bit": Entry(
        build=_qgalore_adamw8bit, projected=True, heeds=_ADAM, defaults={"basis_bits": 4, "cos_threshold": 0.4}
    ),
    "galore-adafactor": Entry(
        build=_galore_adafactor, projected=True, heeds=_STATE, defaults={"state_dtype": "float32"}
    ),
    "galore-sgd": Entry(build=_galore_sgd, projected=True, heeds=_MOMENTUM | _STATE),
    "adamw": Entry(build=_adamw, projected=False, heeds=_ADAM, prunable=True),
    "adamw8bit": Entry(build=_adamw8bit, projected=False, heeds=_ADAM),
    "adafactor": Entry(build=_adafactor, projected=False, heeds=_NONE),
    "sgd": Entry(build=_sgd, projected=False, heeds=_MOMENTUM, prunable=True),
}
"""Every optimizer by the name that ``--optimizer`` takes."""

NAMES = tuple(REGISTRY)


def is_projected(name: str) -> bool:
    """Whether the optimizer of this name projects."""
    return REGISTRY[name].projected


def heeds(name: str, setting: str) -> bool:
    """Whether a setting has an effect on the optimizer of this name, of those that not all optimizers have.

    >>> heeds("galore-sgd", "beta1"), heeds("galore-sgd", "beta2"), heeds("galore-sgd", "lr")
    (True, False, True)
    """
    return setting not in OF_SOME or setting in REGISTRY[name].heeds


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
    return REGISTRY[name].defaults if name in REGISTRY else {}


def is_prunable(name: str) -> bool:
    """Whether single numbers of the state of the optimizer of this name can be set to zero."""
    return REGISTRY[name].prunable


def groups_of(model: Module, config: OptimizerConfig, targets: str | Sequence[str] = MATRICES) -> Groups:
    """The model's parameter groups, matrices first, with the learning rate of each.

    Args:
        model: a Transformers model.
        config: the projection's settings and the learning rates.
        targets: which modules hold the matrices; see `galore_torch.param_groups`.

    Returns:
        Groups for a torch optimizer; they carry the projection's keys if the optimizer projects.
    """
    from galore_torch import param_groups
    from galore_torch.optim.keys import PROJECTED_DEFAULTS

    groups = param_groups(
        model,
        config.rank if is_projected(config.optimizer) else 1,  # which weights are matrices does not depend on it
        targets,
        update_proj_gap=config.gap,
        scale=config.scale,
        proj_type=config.proj_type,
        decomposition=config.decomposition,
        stagger=config.stagger,
        basis_bits=config.basis_bits,
        cos_threshold=config.cos_threshold,
        gamma_proj=config.gamma_proj,
        queue_size=config.queue_size,
        project_adapters=not is_projected(config.optimizer),  # the matrices of adapters have their learning rate
    )
    matrices = [group for group in groups if "rank" in group]
    others = [group for group in groups if "rank" not in group]
    for group in others:
        group["lr"] = config.lr if config.others_lr is None else config.others_lr
    if not is_projected(config.optimizer):
        keys = {"rank", *PROJECTED_DEFAULTS}
        matrices = [{key: group[key] for key in group if key not in keys} for group in matrices]
    return [*matrices, *others]


def build(model: Module, config: OptimizerConfig, seed: int, targets: str | Sequence[str] = MATRICES) -> Optimizer:
    """Make the optimizer that the settings name, over the model's parameters.

    Raises:
        ValueError: when the projection's settings do not fit the model.
        ImportError: when the optimizer's library is not installed.
    """
    name = config.optimizer
    if config.update == "backward" and not is_projected(name):
        name = f"galore-{name}"  # whose hooks move each weight inside the backward; groups without a rank stay whole
    with warnings.catch_warnings():
        if name != config.optimizer:
            warnings.filterwarnings("ignore", message="no parameter group has a `rank`")  # as is meant here
        return REGISTRY[name].build(groups_of(model, config, targets), config, seed)


def least_state_bytes(optimizer: Optimizer, config: OptimizerConfig) -> int:
    """What the state of an optimizer will take at least, before it has any.

    Args:
        optimizer: as `build` makes it.
        config: by which.
    """
    from galore_torch.optim.groups import projection_in
    from galore_torch.optim.keys import PROJECTED_DEFAULTS

    if not heeds(config.optimizer, "beta2"):  # one moment or a factored one
        return 0
    least = 0
    for group in optimizer.param_groups:
        whole = {**PROJECTED_DEFAULTS, **group}
        for weight in group["params"]:
            numbers = projection_in(whole, weight).state_elements if "rank" in group else 2 * weight.numel()
            least += numbers * (1 if "8bit" in config.optimizer else weight.element_size())
    return least


class TrainerOptimizer:
    """What ``Trainer(optimizer_cls_and_kwargs=(TrainerOptimizer, {...}))`` calls once it has the model."""

    def __call__(
        self, model: Module, *, config: OptimizerConfig, seed: int, targets: str | Sequence[str] = MATRICES
    ) -> Optimizer:
        """Make the optimizer, see `build`, and form and apply gradients as the settings say."""
        from galore_torch import GaLore, attach
        from galore_torch.gradients.attach import Gradients, Update

        made = build(model, config, seed, targets)
        if isinstance(made, GaLore):
            modes = cast(Gradients, config.gradients), cast(Update, config.update)
            attach(model, made, *modes, image_bits=config.image_bits)
        return made
