"""The ways of training that are compared: full-rank AdamW, galore-torch 1.0 and ours in each mode.

A method gets a model, sets up all that belongs to it, and returns what closes a step after the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.peers import GALORE_1, Peer
from benchmarks.training import Training

Close = Callable[[], None]
LEARNING_RATE = 1e-4  # the tokens are random: nothing is to be learned, and nothing may overflow
REFERENCE = "adamw"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of training.

    Attributes:
        set_up: Builds the optimizer, attaches what is to be attached, and returns what closes a step.
        gradients: How the projected weights' gradients are formed; "full rank" if nothing is projected.
        in_backward: Whether weights move inside the backward pass, so that no gradients accumulate.
        eight_bit: Whether the moments are stored in 8 bits.
        peer: What it needs in place of our package.
    """

    set_up: Callable[[nn.Module, Training], Close]
    gradients: Literal["full rank", "full", "projected", "fused"]
    in_backward: bool = False
    eight_bit: bool = False
    peer: Peer | None = None


def _closing(optimizer: Optimizer) -> Close:
    def close() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return close


def _per_layer(weights: Iterable[Tensor], build: Callable[[Tensor], Optimizer]) -> Close:
    """Give each weight an optimizer of its own that steps as soon as the gradient is complete, and frees it."""
    optimizers = {weight: build(weight) for weight in weights}

    def step(weight: Tensor) -> None:
        optimizers[weight].step()
        optimizers[weight].zero_grad()

    for weight in optimizers:
        weight.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]
    return lambda: None


def adamw(model: nn.Module, _: Training) -> Close:
    """Train with the fused AdamW of torch, full-rank."""
    return _closing(torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True))


def adamw_per_layer(model: nn.Module, _: Training) -> Close:
    """Train with a fused AdamW for each weight, stepped inside the backward pass."""
    return _per_layer(model.parameters(), lambda weight: torch.optim.AdamW([weight], lr=LEARNING_RATE, fused=True))


def projected_names(model: nn.Module) -> set[str]:
    """Return the names of the weights that the paper projects: the linear layers of attention and MLP."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ("attn" in name or "mlp" in name)
    }


def _galore_1(groups: list[dict[str, Any]]) -> Optimizer:
    from galore_torch import GaLoreAdamW

    return GaLoreAdamW(groups, lr=LEARNING_RATE, no_deprecation_warning=True)


def _galore_1_keys(training: Training) -> dict[str, Any]:
    return {"rank": training.rank, "update_proj_gap": training.gap, "scale": 0.25, "proj_type": "std"}


def galore_1(model: nn.Module, training: Training) -> Close:
    """Train with galore-torch 1.0 as its README shows it."""
    names = projected_names(model)
    projected = [weight for name, weight in model.named_parameters() if name in names]
    others = [weight for name, weight in model.named_parameters() if name not in names]
    return _closing(_galore_1([{"params": others}, {"params": projected, **_galore_1_keys(training)}]))


def galore_1_per_layer(model: nn.Module, training: Training) -> Close:
    """Train with one optimizer of galore-torch 1.0 for each weight, as its README and Transformers do per layer."""
    names = projected_names(model)
    projected = {weight for name, weight in model.named_parameters() if name in names}

    def build(weight: Tensor) -> Optimizer:
        return _galore_1([{"params": [weight], **(_galore_1_keys(training) if weight in projected else {})}])

    return _per_layer(model.parameters(), build)


def ours(gradients: Any, update: Any, *, eight_bit: bool = False) -> Method:
    """Train with this package, in one of its modes."""

    def set_up(model: nn.Module, training: Training) -> Close:
        from galore_torch import GaLoreAdamW, GaLoreAdamW8bit, param_groups
        from galore_torch.gradients import attach

        groups = param_groups(model, training.rank, update_proj_gap=training.gap, stagger=training.stagger)
        optimizer = (GaLoreAdamW8bit if eight_bit else GaLoreAdamW)(groups, lr=LEARNING_RATE)
        attach(model, optimizer, gradients=gradients, update=update)
        return _closing(optimizer)

    return Method(set_up=set_up, gradients=gradients, in_backward=update == "backward", eight_bit=eight_bit)


METHODS: dict[str, Method] = {
    REFERENCE: Method(set_up=adamw, gradients="full rank"),
    "adamw/per-layer": Method(set_up=adamw_per_layer, gradients="full rank", in_backward=True),
    "galore-1.0": Method(set_up=galore_1, gradients="full", peer=GALORE_1),
    "galore-1.0/per-layer": Method(set_up=galore_1_per_layer, gradients="full", in_backward=True, peer=GALORE_1),
}
"""Every method by the name that it has in tables and on the command line; ours are `gradients/update` of `attach`."""

for _eight_bit in (False, True):
    for _mode in ("full/step", "projected/step", "fused/step", "full/backward", "fused/backward"):
        METHODS[_mode + "/8bit" * _eight_bit] = ours(*_mode.split("/"), eight_bit=_eight_bit)

SIXTEEN_BIT = [name for name, method in METHODS.items() if not method.eight_bit]
"""All but those with 8-bit states."""
