"""Which optimizer a name stands for, and how Transformers' Trainer comes by it.

Every entry is fed the same parameter groups: first the matrices (the attention's and the MLPs' linear weights, which
GaLore projects), then the others (embeddings, head, norms), whose learning rate may differ. A full-rank optimizer gets
the same groups without the projection's keys, so that "matrices" and "others" mean one thing in every comparison.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import Module
from torch.optim import Optimizer

import galore_torch
from galore_torch.group_keys import KEYS, PROJECTED_DEFAULTS
from galore_torch.optim.groups import projection_in
from galore_torch.training.settings.optimizer import (
    MATRICES,
    OptimizerConfig,
    has_effect,
    is_of_fixed_size,
    is_projected,
)

Groups = list[dict[str, Any]]


def _adam(config: OptimizerConfig) -> dict[str, Any]:
    """What every Adam takes, by the names that torch, bitsandbytes and ours share."""
    betas = (config.beta1, config.beta2)
    return {"lr": config.lr, "betas": betas, "eps": config.eps, "weight_decay": config.weight_decay}


def _sgd(config: OptimizerConfig) -> dict[str, Any]:
    return {"lr": config.lr, "momentum": config.beta1, "weight_decay": config.weight_decay}


def _factored(config: OptimizerConfig) -> dict[str, Any]:
    return {"lr": config.lr, "weight_decay": config.weight_decay, "scale_parameter": False, "relative_step": False}


def _state_dtype(config: OptimizerConfig) -> dict[str, Any]:
    return {} if config.state_dtype is None else {"state_dtype": getattr(torch, config.state_dtype)}


def _few_bits(config: OptimizerConfig) -> dict[str, Any]:
    # Said to the optimizer too, for its groups take a value that is GaLore's own default for one that nobody said.
    return {"basis_bits": config.basis_bits, "cos_threshold": config.cos_threshold}


def _muon(config: OptimizerConfig) -> dict[str, Any]:
    # Said to the optimizer too, as its bits are to one of few bits.
    names = ("scale", "residual", "residual_scale", "moments", "normalize")
    return {name: config.group_keys[name] for name in names}


def _adamw8bit(groups: Groups, config: OptimizerConfig, _seed: int) -> Optimizer:
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(groups, **_adam(config))  # type: ignore[no-untyped-call]


def _adafactor(groups: Groups, config: OptimizerConfig, _seed: int) -> Optimizer:
    from transformers import Adafactor

    return Adafactor(groups, **_factored(config))  # type: ignore[no-untyped-call]


_BUILDERS: dict[str, Callable[[Groups, OptimizerConfig, int], Optimizer]] = {
    "galore-adamw": lambda g, c, seed: galore_torch.GaLoreAdamW(g, **_adam(c), **_state_dtype(c), seed=seed),
    "galore-adamw8bit": lambda g, c, seed: galore_torch.GaLoreAdamW8bit(g, **_adam(c), seed=seed),
    "qgalore-adamw8bit": lambda g, c, seed: galore_torch.QGaLoreAdamW8bit(g, **_adam(c), **_few_bits(c), seed=seed),
    "galore-adafactor": lambda g, c, seed: galore_torch.GaLoreAdafactor(
        g, **_factored(c), **_state_dtype(c), seed=seed
    ),
    "galore-muon": lambda g, c, seed: galore_torch.GaLoreMuon(
        g, momentum=c.beta1, **_adam(c), **_muon(c), **_state_dtype(c), seed=seed
    ),
    "galore-sgd": lambda g, c, seed: galore_torch.GaLoreSGD(g, **_sgd(c), **_state_dtype(c), seed=seed),
    "adamw": lambda g, c, _: torch.optim.AdamW(g, **_adam(c), fused=True),
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "sgd": lambda g, c, _: torch.optim.SGD(g, **_sgd(c)),
}
"""What makes each optimizer from the parameter groups, the settings and the run's seed."""


def build(
    model: Module, config: OptimizerConfig, seed: int, target_modules: str | Sequence[str] = MATRICES
) -> Optimizer:
    """Make the optimizer that the settings name, over the model's parameters.

    Args:
        model: a Transformers model.
        config: the optimizer's settings.
        seed: of random bases and of rounding.
        target_modules: which modules hold the matrices; see `galore_torch.param_groups`.

    Returns:
        An optimizer whose first groups hold the matrices, with the projection's keys if it projects, and whose last
        ones hold the others, with their learning rate.

    Raises:
        ValueError: when the projection's settings do not fit the model.
        ImportError: when the optimizer's library is not installed.
    """
    name: str = config.optim
    projected = is_projected(name)
    keys = config.group_keys if projected else {"rank": 1}  # which weights are matrices does not depend on it
    groups = galore_torch.param_groups(
        model,
        target_modules=target_modules,
        project_adapters=not projected,  # the matrices of adapters have their learning rate
        **keys,
    )
    if config.update == "backward" and not projected:
        name = f"galore-{name}"  # whose hooks move each weight inside the backward; groups without a rank stay whole
    with warnings.catch_warnings():
        if name != config.optim:
            warnings.filterwarnings("ignore", message="no parameter group has a `rank`")  # as is meant here
        return _BUILDERS[name](_matrices_first(groups, config), config, seed)


def _matrices_first(groups: Groups, config: OptimizerConfig) -> Groups:
    """The groups with the learning rate of each; without the projection's keys, if the optimizer does not project."""
    matrices = [group for group in groups if "rank" in group]
    others_lr = config.lr if config.others_lr is None else config.others_lr
    others = [{**group, "lr": others_lr} for group in groups if "rank" not in group]
    if not is_projected(config.optim):
        matrices = [{key: group[key] for key in group if key not in KEYS} for group in matrices]
    return [*matrices, *others]


def least_state_bytes(optimizer: Optimizer, config: OptimizerConfig) -> int:
    """What the state of an optimizer that `build` made will take at least, before it has any."""
    if not has_effect("beta2", config.optim) or is_of_fixed_size(config.optim):  # one moment or a factored one
        return 0
    least = 0
    for group in optimizer.param_groups:
        whole = {**PROJECTED_DEFAULTS, **group}
        for weight in group["params"]:
            numbers = projection_in(whole, weight).state_elements if "rank" in group else 2 * weight.numel()
            least += numbers * (1 if "8bit" in config.optim else weight.element_size())
    return least


class TrainerOptimizer:
    """Gives ``Trainer(optimizer_cls_and_kwargs=(TrainerOptimizer, {...}))`` its optimizer once it has placed the model.

    The Trainer makes one without arguments and calls it with the model.
    """

    def __call__(self, model: Module, *, optimizer: Optimizer, config: OptimizerConfig) -> Optimizer:
        """Form and apply gradients as the settings say, and return the optimizer that `build` made of the model."""
        if isinstance(optimizer, galore_torch.GaLore):
            galore_torch.attach(model, optimizer, config.gradients, config.update, grad_bits=config.grad_bits)
        return optimizer
