"""Which optimizer a name stands for, and the factory through which Transformers' Trainer makes it.

Every entry is fed the same parameter groups: first the matrices (the attention's and the MLPs' linear weights, which
GaLore projects), then the others (embeddings, head, norms), whose learning rate may differ. A full-rank optimizer gets
the same groups without the projection's keys, so that "matrices" and "others" mean one thing in every comparison.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from galore_torch.training.settings.optimizer import OptimizerConfig, heeds, is_projected

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import Optimizer


Groups = list[dict[str, Any]]

MATRICES = ("attn", "mlp")
"""Parts of the names of the modules whose linear weights are meant by matrices; see `galore_torch.param_groups`."""


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


_BUILDERS: dict[str, Callable[[Groups, OptimizerConfig, int], Optimizer]] = {
    "galore-adamw": _galore_adamw,
    "galore-adamw8bit": _galore_adamw8bit,
    "qgalore-adamw8bit": _qgalore_adamw8bit,
    "galore-adafactor": _galore_adafactor,
    "galore-sgd": _galore_sgd,
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "sgd": _sgd,
}
"""What makes each optimizer from the parameter groups, the settings and the run's seed."""


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
        config.rank if is_projected(config.optim) else 1,  # which weights are matrices does not depend on it
        targets,
        update_proj_gap=config.update_proj_gap,
        scale=config.scale,
        proj_type=config.proj_type,
        decomposition=config.decomposition,
        stagger=config.stagger,
        basis_bits=config.basis_bits,
        cos_threshold=config.cos_threshold,
        gamma_proj=config.gamma_proj,
        queue_size=config.queue_size,
        project_adapters=not is_projected(config.optim),  # the matrices of adapters have their learning rate
    )
    matrices = [group for group in groups if "rank" in group]
    others = [group for group in groups if "rank" not in group]
    for group in others:
        group["lr"] = config.lr if config.others_lr is None else config.others_lr
    if not is_projected(config.optim):
        keys = {"rank", *PROJECTED_DEFAULTS}
        matrices = [{key: group[key] for key in group if key not in keys} for group in matrices]
    return [*matrices, *others]


def build(model: Module, config: OptimizerConfig, seed: int, targets: str | Sequence[str] = MATRICES) -> Optimizer:
    """Make the optimizer that the settings name, over the model's parameters.

    Raises:
        ValueError: when the projection's settings do not fit the model.
        ImportError: when the optimizer's library is not installed.
    """
    name = config.optim
    if config.update == "backward" and not is_projected(name):
        name = f"galore-{name}"  # whose hooks move each weight inside the backward; groups without a rank stay whole
    with warnings.catch_warnings():
        if name != config.optim:
            warnings.filterwarnings("ignore", message="no parameter group has a `rank`")  # as is meant here
        return _BUILDERS[name](groups_of(model, config, targets), config, seed)


def least_state_bytes(optimizer: Optimizer, config: OptimizerConfig) -> int:
    """What the state of an optimizer will take at least, before it has any.

    Args:
        optimizer: as `build` makes it.
        config: by which.
    """
    from galore_torch.optim.groups import projection_in
    from galore_torch.optim.keys import PROJECTED_DEFAULTS

    if not heeds(config.optim, "beta2"):  # one moment or a factored one
        return 0
    least = 0
    for group in optimizer.param_groups:
        whole = {**PROJECTED_DEFAULTS, **group}
        for weight in group["params"]:
            numbers = projection_in(whole, weight).state_elements if "rank" in group else 2 * weight.numel()
            least += numbers * (1 if "8bit" in config.optim else weight.element_size())
    return least


class TrainerOptimizer:
    """What ``Trainer(optimizer_cls_and_kwargs=(TrainerOptimizer, {...}))`` calls once it has the model."""

    def __call__(
        self, model: Module, *, config: OptimizerConfig, seed: int, targets: str | Sequence[str] = MATRICES
    ) -> Optimizer:
        """Make the optimizer, see `build`, and form and apply gradients as the settings say."""
        from galore_torch import GaLore, attach
        from galore_torch.gradients.modes import Gradients, Update

        made = build(model, config, seed, targets)
        if isinstance(made, GaLore):
            modes = cast(Gradients, config.gradients), cast(Update, config.update)
            attach(model, made, *modes, grad_bits=config.grad_bits)
        return made
