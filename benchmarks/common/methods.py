"""The ways of training that are compared: each a name, an optimizer, and how its gradients are formed and applied.

Names are those of `galore pretrain --method`; how a method that projects forms its gradients comes after a slash. They
stand here again, and a test holds them to those, because a process that measures a published package imports it in
place of ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.common.peers import PEERS, Peer
from benchmarks.common.sizes import Llama

Groups = list[dict[str, Any]]

LEARNING_RATE = 1e-4  # gradients or tokens are random: nothing is to be learned, and nothing may overflow
REFERENCE = "full"  # what the others are compared with


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of training."""

    optimizer: str = "GaLoreAdamW"  # key of `BUILDERS`
    gradients: Literal["full", "projected", "fused"] = "full"  # how those of projected weights are formed
    update: Literal["step", "backward"] = "step"  # "backward": inside it, so that no gradients accumulate
    basis_bits: int = 16  # in what bases are kept: 16, 8 or 4
    weight_bits: int = 16  # in what attention and MLP weights are kept: 16 or 8
    recomputes: bool = False  # whether the backward computes activations again

    @property
    def peer(self) -> Peer | None:
        """The published package that holds the optimizer."""
        return PEERS.get(self.optimizer)

    @property
    def ours(self) -> bool:
        """Whether the optimizer is of this package."""
        return self.optimizer.startswith("GaLore")

    @property
    def projects(self) -> bool:
        """Whether the optimizer has a rank."""
        return self.ours or self.peer is not None

    @property
    def state_bits(self) -> int:
        """In what moments are kept: 16, or 8 by bitsandbytes."""
        return 8 if "8bit" in self.optimizer else 16

    def build(self, projected: Sequence[Tensor], others: Sequence[Tensor], size: Llama, **keywords: Any) -> Any:
        """Return the optimizer over weights that it projects, if it does so, and over others.

        Rank and gap are those of `size`; keywords are `lr`, and `stagger`: whether our layers take turns to renew.
        """
        keys: dict[str, Any] = {"rank": size.rank, "update_proj_gap": size.gap} if self.projects else {}
        if self.ours:
            keys |= {"stagger": keywords.get("stagger", True), "basis_bits": self.basis_bits}
        groups = [{"params": list(projected), **keys}, {"params": list(others)}]
        return BUILDERS[self.optimizer]([one for one in groups if one["params"]], keywords.get("lr", LEARNING_RATE))

    def build_over(self, model: nn.Module, size: Llama, **keywords: Any) -> Any:
        """Return the optimizer over all of a model; it projects linear layers of attention and MLP, as the paper."""
        linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        parts: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, weight in model.named_parameters():
            parts[name in linear and ("attn" in name or "mlp" in name)].append(weight)
        return self.build(parts[True], parts[False], size, **keywords)

    def set_up(self, model: nn.Module, size: Llama, **keywords: Any) -> tuple[Any, Callable[[], None]]:
        """Build the optimizer over a model, attach what is to be attached, and return it and what ends a step."""
        whole = self.build_over(model, size, **keywords)
        if self.ours:
            from galore_torch import attach

            attach(model, whole, self.gradients, self.update)
        elif self.update == "backward":
            for group in whole.param_groups:  # one optimizer each, as the README of galore-torch 1.0 has it
                for weight in group["params"]:
                    own = self.build(*(([weight], []) if "rank" in group else ([], [weight])), size, **keywords)
                    weight.register_post_accumulate_grad_hook(lambda _, own=own: _step(own))
            return whole, lambda: None
        return whole, partial(_step, whole)


def _step(optimizer: Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


def _ours(recipe: str, groups: Groups, lr: float, **keywords: Any) -> Any:
    import galore_torch

    return getattr(galore_torch, recipe)(groups, lr=lr, **keywords)


def _adamw8bit(groups: Groups, lr: float) -> Any:
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(groups, lr=lr)  # type: ignore[no-untyped-call]


def _with(groups: Groups, **own: Any) -> Groups:
    """The groups, the projected ones with keys of their own."""
    return [{**group, **own} if "rank" in group else group for group in groups]


def _galore_1(groups: Groups, lr: float) -> Any:
    return _ours("GaLoreAdamW", _with(groups, scale=0.25, proj_type="std"), lr, no_deprecation_warning=True)


def _apollo(groups: Groups, lr: float) -> Any:
    from apollo_torch import APOLLOAdamW

    return APOLLOAdamW(_with(groups, scale=1, proj="random", proj_type="std", scale_type="channel"), lr=lr)


def _fira(groups: Groups, lr: float) -> Any:
    return _ours("GaLoreAdamW", _with(groups, residual="fira"), lr)


def _momentum(groups: Groups, lr: float, **size: Any) -> Any:
    return _ours(
        "GaLore",
        _with(groups, residual="full", moments="rotate", scale=0.2, **size),
        lr,
        optimizer_class=torch.optim.SGD,
        momentum=0.9,
        nesterov=True,
        fused=True,
    )


BUILDERS: dict[str, Callable[[Groups, float], Any]] = {
    "AdamW": lambda groups, lr: torch.optim.AdamW(groups, lr=lr, fused=True),
    "AdamW8bit": _adamw8bit,
    "GaLoreAdamW": partial(_ours, "GaLoreAdamW"),
    "GaLoreAdamW8bit": partial(_ours, "GaLoreAdamW8bit"),
    "GaLore, Fira": _fira,
    "GaLore, columns": partial(_momentum, normalize="columns"),
    "GaLore, blocks": partial(_momentum, normalize="blocks"),
    "galore-torch-1.0": _galore_1,
    "apollo-torch-1.0.3": _apollo,
}
"""What makes each optimizer of groups. The published ones have the defaults of their READMEs."""

METHODS: dict[str, Method] = {
    REFERENCE: Method(optimizer="AdamW"),
    "full-per-layer": Method(optimizer="AdamW", update="backward"),
    "galore-1.0": Method(optimizer="galore-torch-1.0"),
    "galore-1.0-per-layer": Method(optimizer="galore-torch-1.0", update="backward"),
    "galore/full": Method(),
    "galore/projected": Method(gradients="projected"),
    "galore/fused": Method(gradients="fused"),
    "galore-per-layer/full": Method(update="backward"),
    "galore-per-layer/fused": Method(gradients="fused", update="backward"),
    "galore-8bit/full": Method(optimizer="GaLoreAdamW8bit"),
    "galore-8bit/projected": Method(optimizer="GaLoreAdamW8bit", gradients="projected"),
    "galore-8bit/fused": Method(optimizer="GaLoreAdamW8bit", gradients="fused"),
    "galore-8bit-per-layer/full": Method(optimizer="GaLoreAdamW8bit", update="backward"),
    "galore-8bit-per-layer/fused": Method(optimizer="GaLoreAdamW8bit", gradients="fused", update="backward"),
}
"""Every method that trains a model, by the name that it has in tables and on the command line."""

OPTIMIZERS: dict[str, Method] = {
    REFERENCE: METHODS[REFERENCE],
    "adam8bit": Method(optimizer="AdamW8bit"),
    "galore": Method(),
    "galore-8bit": Method(optimizer="GaLoreAdamW8bit"),
    "galore, 8-bit bases": Method(basis_bits=8),
    "galore, INT8 weights": Method(weight_bits=8),
    "galore-1.0": METHODS["galore-1.0"],
    "apollo-1.0.3": Method(optimizer="apollo-torch-1.0.3"),
    "galore, Fira's residual": Method(optimizer="GaLore, Fira"),
    "momentum and residual, columns": Method(optimizer="GaLore, columns"),
    "momentum and residual, blocks": Method(optimizer="GaLore, blocks"),
}
"""Those whose step alone is measured, on gradients that are there already."""

SIXTEEN_BIT = [name for name, method in METHODS.items() if method.state_bits == 16]
"""All but those with 8-bit states."""
