"""The ways of training that are compared: full-rank AdamW, galore-torch 1.0 and ours in each mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from benchmarks.common.sizes import Llama
    from galore_torch import GaLore

Close = Callable[[], None]
"""What closes a step after the backward pass."""

LEARNING_RATE = 1e-4  # the tokens are random: nothing is to be learned, and nothing may overflow
REFERENCE = "adamw"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of training."""

    # how the projected weights' gradients are formed, as `attach` has it; "full rank": none is projected
    gradients: Literal["full rank", "full", "projected", "fused"]
    # "backward" if weights move inside the backward pass, so that no gradients accumulate
    update: Literal["step", "backward"] = "step"
    state_bits: int = 16  # in what moments are kept: 16, or 8 by bitsandbytes
    basis_bits: int = 16  # in what bases are kept: 16, 8 or 4
    weight_bits: int = 16  # in what attention and MLP weights are kept: 16 or 8
    recomputes: bool = False  # whether the backward computes activations again
    peer: str | None = None  # the published package that is imported in place of ours; a key of `PEERS`


METHODS: dict[str, Method] = {
    REFERENCE: Method(gradients="full rank"),
    "adamw/per-layer": Method(gradients="full rank", update="backward"),
    "galore-1.0": Method(gradients="full", peer="galore-torch-1.0"),
    "galore-1.0/per-layer": Method(gradients="full", update="backward", peer="galore-torch-1.0"),
    "full/step": Method(gradients="full"),
    "projected/step": Method(gradients="projected"),
    "fused/step": Method(gradients="fused"),
    "full/backward": Method(gradients="full", update="backward"),
    "fused/backward": Method(gradients="fused", update="backward"),
    "full/step/8bit": Method(gradients="full", state_bits=8),
    "projected/step/8bit": Method(gradients="projected", state_bits=8),
    "fused/step/8bit": Method(gradients="fused", state_bits=8),
    "full/backward/8bit": Method(gradients="full", update="backward", state_bits=8),
    "fused/backward/8bit": Method(gradients="fused", update="backward", state_bits=8),
}
"""Every method by the name that it has in tables and on the command line; ours are `gradients/update` of `attach`."""

SIXTEEN_BIT = [name for name, method in METHODS.items() if method.state_bits == 16]
"""All but those with 8-bit states."""


def set_up(model: nn.Module, size: Llama, method: Method, *, stagger: bool = True) -> Close:
    """Build the optimizer, attach what is to be attached, and return what closes a step."""
    if method.gradients == "full rank" or method.peer:
        return _plain(model, size, method)
    from galore_torch import attach

    optimizer = build_optimizer(model, size, method, stagger=stagger)
    attach(model, optimizer, method.gradients, method.update)
    return partial(_step, optimizer)


def build_optimizer(
    model: nn.Module, size: Llama, method: Method, *, lr: float = LEARNING_RATE, stagger: bool = True
) -> GaLore:
    """Return ours over all of a model: attention and MLP projected, the others as they are."""
    from galore_torch import GaLoreAdamW, GaLoreAdamW8bit, param_groups

    groups = param_groups(model, size.rank, update_proj_gap=size.gap, basis_bits=method.basis_bits, stagger=stagger)
    return (GaLoreAdamW8bit if method.state_bits == 8 else GaLoreAdamW)(groups, lr=lr)


def _step(optimizer: Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


def _plain(model: nn.Module, size: Llama, method: Method) -> Close:
    """The fused AdamW of torch, or galore-torch 1.0 as its README shows it: whole, or one for each weight."""
    make: Callable[[list[dict[str, Any]]], Optimizer] = partial(torch.optim.AdamW, lr=LEARNING_RATE, fused=True)
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if method.peer:
        from galore_torch import GaLoreAdamW

        make = partial(GaLoreAdamW, lr=LEARNING_RATE, no_deprecation_warning=True)
        names, parts = projected_names(model), dict[bool, list[Tensor]]({False: [], True: []})
        for name, weight in model.named_parameters():
            parts[name in names].append(weight)
        keys = {"rank": size.rank, "update_proj_gap": size.gap, "scale": 0.25, "proj_type": "std"}
        groups = [{"params": parts[False]}, {"params": parts[True], **keys}]
    if method.update == "step":
        return partial(_step, make(groups))
    for group in groups:
        for weight in group["params"]:  # each steps as soon as its gradient is complete, and frees it
            own = make([{**group, "params": [weight]}])
            weight.register_post_accumulate_grad_hook(lambda _, own=own: _step(own))
    return lambda: None


def projected_names(model: nn.Module) -> set[str]:
    """Return the names of the weights that the paper projects: the linear layers of attention and MLP."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ("attn" in name or "mlp" in name)
    }
