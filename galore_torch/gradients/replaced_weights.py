"""Refuses to go on where a model has got other parameters than the optimizer holds.

`load_state_dict(assign=True)`, a new head or a changed dtype puts new ones in their place. The old ones get no gradient
any more, the new ones' gradients are nobody's, and torch's optimizers train on without a word. Who replaces them in the
model and in the optimizer's groups, as Accelerate does for FSDP2, has done nothing wrong.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from galore_torch.optim.galore import GaLore


def refuse_replaced_weights(model: nn.Module, optimizer: GaLore) -> Any:
    """Lets `step()` raise an error where weights of a model have been replaced and would not be trained.

    Args:
        model: the model, with the weights that the optimizer holds. It is held weakly.
        optimizer: of these weights.

    Returns:
        A handle with `remove()`.
    """
    weights = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    held = weakref.ref(model)

    def check(stepped: GaLore, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        idle = [(name, weight) for name, weight in weights if weight.grad is None]
        trained = held() if idle else None
        if trained is None:
            return
        now = [(name, new) for name, weight in idle if (new := _parameter(trained, name)) is not weight]
        if not now:
            return
        ours = {id(weight) for group in stepped.param_groups for weight in group["params"]}  # a trainer may swap both
        replaced = [name for name, new in now if new is not None and new.grad is not None and id(new) not in ours]
        if replaced:
            raise ValueError(
                f"{len(replaced)} of the model's {len(weights)} trainable parameters ({replaced[0]} first) are not "
                "those that the optimizer holds any more, and would not be trained: load_state_dict(assign=True), "
                "a new module or another dtype has put new ones in their place. Build the optimizer and attach after "
                "that; new_optimizer.load_state_dict(optimizer.state_dict()) takes its state over"
            )

    return optimizer.register_step_pre_hook(check)


def _parameter(model: nn.Module, name: str) -> Tensor | None:
    try:
        return model.get_parameter(name)
    except AttributeError:  # the model has lost it: nothing is left untrained
        return None
