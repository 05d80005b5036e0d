"""The ways of training that are compared: each a name, an optimizer, and how its gradients are formed and applied.

Names are those of `galore pretrain --method`; how a method that projects forms its gradients comes after a slash. They
stand here again, and a test holds them to those, because a process that measures a published package imports it in
place of ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.common.peers import PEERS, Peer
from benchmarks.common.sizes import Llama

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
    compiles: bool = False  # whether blocks of the model are compiled, each by itself

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
        where, own, arguments = BUILDERS[self.optimizer]
        keys: dict[str, Any] = {"rank": size.rank, "update_proj_gap": size.gap, **own} if self.projects else {}
        if self.ours:
            keys |= {"stagger": keywords.get("stagger", True), "basis_bits": self.basis_bits}
        groups = [{"params": list(projected), **keys}, {"params": list(others)}]
        lr = keywords.get("lr", LEARNING_RATE)
        return resolve_name(where)([one for one in groups if one["params"]], lr=lr, **arguments)

    def set_up(self, model: nn.Module, size: Llama, **keywords: Any) -> tuple[Any, Callable[[], None]]:
        """Build the optimizer over a model, attach what is to be attached, and return it and what ends a step.

        It projects linear layers of attention and MLP, as the paper.
        """
        linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        parts: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, weight in model.named_parameters():
            parts[name in linear and ("attn" in name or "mlp" in name)].append(weight)
        whole = self.build(parts[True], parts[False], size, **keywords)
        if self.ours:
            from galore_torch import attach

            attach(model, whole, self.gradients, self.update)
        elif self.update == "backward":
            for projected, weights in parts.items():  # one optimizer each, as the README of galore-torch 1.0 has it
                for one in weights:
                    own = self.build(*(([one], []) if projected else ([], [one])), size, **keywords)
                    one.register_post_accumulate_grad_hook(lambda _, own=own: _step(own))  # type: ignore[no-untyped-call]
            return whole, lambda: None
        return whole, partial(_step, whole)


def _step(optimizer: Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


_MOMENTUM: dict[str, Any] = {"residual": "full", "moments": "rotate", "scale": 0.2}
_SGD: dict[str, Any] = {"optimizer_class": torch.optim.SGD, "momentum": 0.9, "nesterov": True, "fused": True}
_OF_APOLLO: dict[str, Any] = {"scale": 1, "proj": "random", "proj_type": "std", "scale_type": "channel"}

BUILDERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "AdamW": ("torch.optim:AdamW", {}, {"fused": True}),
    "AdamW8bit": ("bitsandbytes.optim.adamw:AdamW8bit", {}, {}),
    "GaLoreAdamW": ("galore_torch:GaLoreAdamW", {}, {}),
    "GaLoreAdamW8bit": ("galore_torch:GaLoreAdamW8bit", {}, {}),
    "GaLore, Fira": ("galore_torch:GaLoreAdamW", {"residual": "fira"}, {}),
    "GaLore, columns": ("galore_torch:GaLore", {**_MOMENTUM, "normalize": "columns"}, _SGD),
    "GaLore, blocks": ("galore_torch:GaLore", {**_MOMENTUM, "normalize": "blocks"}, _SGD),
    "galore-torch-1.0": (
        "galore_torch:GaLoreAdamW",
        {"scale": 0.25, "proj_type": "std"},
        {"no_deprecation_warning": True},
    ),
    "apollo-torch-1.0.3": ("apollo_torch:APOLLOAdamW", _OF_APOLLO, {}),
}
"""Each optimizer's class, keys of its projected weights, and arguments. The published have their READMEs' defaults."""

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
