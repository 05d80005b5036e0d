"""Which optimizer a name stands for, and how Transformers' Trainer comes by it.

Every entry is fed the same parameter groups: first the matrices (the attention's and the MLPs' linear weights, which
GaLore projects), then the others (embeddings, head, norms), whose learning rate may differ. A full-rank optimizer gets
the same groups without the projection's keys, so that "matrices" and "others" mean one thing in every comparison.
"""

from __future__ import annotations

import inspect
import pkgutil
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

import galore_torch
from galore_torch.group_keys import KEYS, PROJECTED_DEFAULTS
from galore_torch.memory import Job
from galore_torch.optim.groups import projection_in
from galore_torch.training.settings.optimizer import KINDS, MATRICES, OptimizerConfig, has_effect


def build(
    model: Module, config: OptimizerConfig, seed: int, target_modules: str | Sequence[str] | None = MATRICES
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
    projected = KINDS[name].projected
    keys = config.group_keys if projected else {"rank": 1}  # which weights are matrices does not depend on it
    groups = galore_torch.param_groups(
        model,
        target_modules=target_modules,
        project_adapters=not projected,  # the matrices of adapters have their learning rate
        others_lr=config.others_lr,
        rank_pattern=config.ranks,
        **keys,
    )
    if not projected:
        groups = [{key: value for key, value in group.items() if key not in KEYS} for group in groups]
    if config.update == "backward" and not projected:
        name = f"galore-{name}"  # whose hooks move each weight inside the backward; groups without a rank stay whole
    with warnings.catch_warnings():
        if name != config.optim:
            warnings.filterwarnings("ignore", message="no parameter group has a `rank`")  # as is meant here
        make = pkgutil.resolve_name(KINDS[name].made_by)
        return make(groups, **_arguments(make, name, config, seed))  # type: ignore[no-any-return]


def _arguments(make: Any, name: str, config: OptimizerConfig, seed: int) -> dict[str, Any]:
    """What the settings say of the arguments that an optimizer has, by the names that all of them share."""
    known = set(inspect.signature(make).parameters)
    if not has_effect("eps", name):
        known -= {"eps"}  # an Adafactor's is another
    state_dtype = {} if config.state_dtype is None else {"state_dtype": getattr(torch, config.state_dtype)}
    found = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "betas": (config.beta1, config.beta2),
        "momentum": config.beta1,
        "eps": config.eps,
        "seed": seed,
        "others_bits": config.others_bits,
        **state_dtype,
        # Of groups that have a key as GaLore does by default, an optimizer with a default of its own thinks it unsaid.
        **config.group_keys,
    }
    return {key: value for key, value in found.items() if key in known} | dict(KINDS[name].arguments)


def matrices(model: Module, target_modules: str | Sequence[str] | None) -> dict[str, Tensor]:
    """The weights that would be projected, by name; of those that are tied or no matrices nothing is said."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = [group for group in galore_torch.param_groups(model, 1, target_modules) if "rank" in group]
    return {name: one for group in groups for name, one in zip(group["param_names"], group["params"], strict=True)}


def job(
    model: Module, config: OptimizerConfig, seed: int, target_modules: str | Sequence[str] | None, **more: Any
) -> Job:
    """What a training with the optimizer that `build` makes needs is found by rehearsing this.

    Args:
        model: on any device.
        config: the optimizer's settings.
        seed: of random bases and of rounding.
        target_modules: which modules hold the matrices.
        **more: the other fields of `galore_torch.memory.Job`.
    """
    return Job(
        model=model,
        optimizer=lambda copied: build(copied, config, seed, target_modules),
        gradients=config.gradients,
        update=config.update,
        grad_bits=config.grad_bits,
        save_inputs=config.save_inputs,
        **more,
    )


def least_state_bytes(optimizer: Optimizer, config: OptimizerConfig) -> int:
    """What the state of an optimizer that `build` made will take at least, before it has any."""
    kind = KINDS[config.optim]
    if not has_effect("beta2", config.optim) or kind.fixed_size:  # one moment or a factored one
        return 0
    groups = [{**PROJECTED_DEFAULTS, **group} for group in optimizer.param_groups]
    return sum(
        projection_in(group, weight).state_elements * (1 if kind.eight_bit else weight.element_size())
        for group in groups
        for weight in group["params"]
    )


class TrainerOptimizer:
    """Gives ``Trainer(optimizer_cls_and_kwargs=(TrainerOptimizer, {...}))`` its optimizer once it has placed the model.

    The Trainer makes one without arguments and calls it with the model.
    """

    def __call__(self, model: Module, *, optimizer: Optimizer, config: OptimizerConfig) -> Optimizer:
        """Form and apply gradients as the settings say, and return the optimizer that `build` made of the model."""
        if isinstance(optimizer, galore_torch.GaLore):
            modes = config.gradients, config.update
            galore_torch.attach(model, optimizer, *modes, grad_bits=config.grad_bits, save_inputs=config.save_inputs)
        return optimizer
