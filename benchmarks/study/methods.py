"""The ways to train that the study compares: what moves the layers' matrices, and what moves the rest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.common.sizes import Llama
from galore_torch import GaLore

Weights = Sequence[Tensor]
Maker = Callable[[Weights, float, Llama], Optimizer]
"""What makes the optimizer of weights, at a rate, of a model of this size."""


class Scaled(Optimizer):
    """Gradients, or one momentum of them, over norms or over second moments that take few numbers.

    Args:
        params: weights or groups of them.
        lr: the rate.
        by: `columns` (SCALE, arXiv 2506.16659: one norm an input, to a root mean square of 0.2), `rows` (one second
            moment a row: embeddings of rare tokens keep their pace) or `both` (factored, as in arXiv 1804.04235).
        momentum: of the gradient; 0 keeps none.
    """

    def __init__(self, params: Any, lr: float, *, by: str = "columns", momentum: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "by": by, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002 (of torch's signature)
        """Move the weights."""
        for group in self.param_groups:
            for weight in group["params"]:
                state, update = self.state[weight], weight.grad
                state["step"] = state.get("step", 0) + 1
                if group["momentum"]:
                    kept = state.setdefault("momentum", torch.zeros_like(weight))
                    update = kept.lerp_(update, 1 - group["momentum"]) / (1 - group["momentum"] ** state["step"])
                if group["by"] == "columns":
                    update = 0.2 * update / update.square().mean(dim=0, keepdim=True).sqrt().clamp_min(1e-12)
                else:
                    update = update / _root(weight.grad, state, both=group["by"] == "both")
                weight.sub_(update, alpha=group["lr"])


def _root(gradient: Tensor, state: dict[str, Any], *, both: bool, beta: float = 0.999) -> Tensor:
    """Return the root of the second moment: each row's mean (a vector's own), or factored by rows and columns."""
    square, debiased = gradient.square(), 1 - beta ** state["step"]
    means = []
    for dim in (1, 0) if both and gradient.dim() > 1 else (1,):
        mean = square.mean(dim=dim, keepdim=True) if gradient.dim() > 1 else square
        means.append(state.setdefault(f"mean {dim}", torch.zeros_like(mean)).lerp_(mean, 1 - beta) / debiased)
    second = means[0] if len(means) == 1 else means[0] * means[1] / means[1].mean()
    root: Tensor = second.sqrt() + 1e-8
    return root


def plain(where: str, **arguments: Any) -> Maker:
    """Return what makes an optimizer, "module:class", with arguments of its own."""
    return lambda weights, lr, _: resolve_name(where)(weights, lr=lr, **arguments)


FUSED: dict[str, Any] = {"fused": True}
SCALED = f"{__name__}:Scaled"
ADAMW = plain("torch.optim:AdamW", weight_decay=0.0, fused=True)  # with the paper's betas
ADAMW_95 = plain("torch.optim:AdamW", weight_decay=0.0, fused=True, betas=(0.9, 0.95))
ADAMW_8BIT = plain("bitsandbytes.optim:AdamW8bit", weight_decay=0.0)
MUON = plain("torch.optim:Muon", weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


def galore(inside: str = "AdamW", of_inside: Mapping[str, Any] = FUSED, **keys: Any) -> Maker:
    """Return what wraps one of torch's optimizers, with arguments of its own, in ours; keys are the group's."""

    def made(weights: Weights, lr: float, size: Llama) -> Optimizer:
        groups = [{"params": list(weights), "rank": size.rank, "update_proj_gap": size.gap, **keys}]
        return GaLore(groups, getattr(torch.optim, inside), lr=lr, weight_decay=0.0, **of_inside)

    return made


def alice(weights: Weights, lr: float, size: Llama) -> Optimizer:
    """Alice (arXiv 2502.07752) of `pytorch_optimizer`, which must be on the path; 40 leading directions of 256."""
    keys = {"rank": size.rank, "update_interval": size.gap, "leading_basis": size.rank * 40 // 256}
    return plain("pytorch_optimizer:Alice", **keys)(weights, lr, size)


def fira(weights: Weights, lr: float, size: Llama) -> Optimizer:
    """Fira (arXiv 2410.01623) as it was released, in `pytorch_optimizer`."""
    keys = {"rank": size.rank, "update_proj_gap": size.gap, "scale": 0.25, "projection_type": "std"}
    made: Optimizer = resolve_name("pytorch_optimizer:Fira")([{"params": list(weights), **keys}], lr)
    return made


def by_columns(weights: Weights, lr: float, _: Llama) -> Optimizer:
    """The head by columns with one momentum, embeddings by a second moment a token, norms by one a number."""
    *first, head = weights
    return Scaled([{"params": first, "by": "rows"}, {"params": [head], "momentum": 0.9}], lr)


@dataclass(frozen=True)
class Method:
    """A way to train."""

    about: str  # in words
    matrices: Maker  # moves the layers' matrices
    lr: float  # their rate, around which the grid is laid
    others: Maker = ADAMW  # moves embeddings, head and norms
    others_lr: float = 0.04  # that of the others, around which it is laid too
    halfway: Mapping[str, Any] = field(default_factory=dict)  # keys that the matrices' groups get in mid-training
    clip: float = 0.0  # norm that gradients are clipped to; 0 clips nothing
    alone: bool = False  # its kernels heed no streams, so that it spoils what is trained beside it in a process


BETA = 0.9
NESTEROV: dict[str, Any] = {"momentum": BETA, "nesterov": True}
MOMENTUM: dict[str, Any] = {"inside": "SGD", "of_inside": NESTEROV, "scale": 0.2, "moments": "rotate"}
"""Momentum in the subspace; a step is 0.2 of the rate once it is normalised."""

FULL: dict[str, Any] = {**MOMENTUM, "residual": "full", "residual_scale": 1 / (1 - BETA)}
"""The same, with a residual that weighs as much as the gradients which SGD's momentum is a sum of."""


def wide(rank: int) -> dict[str, Any]:
    """Return the keys of the same, orthogonalised, at a rank of its own: in few bits twice the columns are a half."""
    return {**FULL, "normalize": "orthogonal", "rank": rank, "basis_bits": 8}


METHODS: dict[str, Method] = {
    "adamw": Method("AdamW", ADAMW, 0.001, others_lr=0.02),
    "galore": Method("GaLore, moments kept", galore(), 0.01),
    "galore-128": Method("GaLore at rank 128, bases in 8 bits", galore(rank=128, basis_bits=8), 0.005, others_lr=0.02),
    "galore-rotate": Method("GaLore, moments rotated", galore(moments="rotate"), 0.01),
    "fira": Method("GaLore, rotated, Fira's residual", galore(moments="rotate", residual="fira"), 0.01),
    "columns": Method("momentum in the subspace and residual, by columns", galore(**FULL, normalize="columns"), 0.003),
    "orthogonal": Method("the same, orthogonalised", galore(**FULL, normalize="orthogonal"), 0.008),
    "orthogonal-96": Method("the same at rank 96, bases in 8 bits", galore(**wide(96)), 0.004, others_lr=0.02),
    "orthogonal-128": Method("the same at rank 128, bases in 8 bits", galore(**wide(128)), 0.004, others_lr=0.02),
    "blocks": Method("the same, orthogonalised in blocks", galore(**FULL, normalize="blocks"), 0.008, others_lr=0.08),
    "muon": Method("Muon", MUON, 0.004, others_lr=0.08),
    "galore-reset": Method("GaLore, moments reset", galore(moments="reset"), 0.01),
    "scale": Method("SCALE", plain(SCALED), 0.003, others_lr=0.02),
    "sumo": Method("momentum in the subspace, orthogonalised", galore(**MOMENTUM, normalize="orthogonal"), 0.008),
    "apollo": Method(
        "APOLLO", galore(residual="apollo", decomposition="random", update_proj_gap=200, scale=1.0), 0.005
    ),
    "alice": Method("Alice, as published", alice, 0.02),
    "fira-published": Method("Fira, as published", fira, 0.01),
    "switched": Method("GaLore, rotated, switched", galore(decomposition="switched", moments="rotate"), 0.01),
    "factored": Method("GaLore; others: factored", galore(), 0.01, plain(SCALED, by="both"), 0.02),
    "rows": Method("GaLore; others: a second moment a row", galore(), 0.01, plain(SCALED, by="rows"), 0.02),
    "head-columns": Method("GaLore; head by columns with momentum, embeddings by rows", galore(), 0.005, by_columns),
    "others-8bit": Method("GaLore; others: AdamW in 8 bits", galore(), 0.01, ADAMW_8BIT, alone=True),
    "sampled": Method("GaLore, rotated, sampled", galore(decomposition="sampled", moments="rotate"), 0.01),
    "random-late": Method(
        "GaLore, rotated, random late", galore(moments="rotate"), 0.01, halfway={"decomposition": "random"}
    ),
    "columns-alone": Method("momentum in the subspace, by columns", galore(**MOMENTUM, normalize="columns"), 0.003),
    "scale-momentum": Method("SCALE with momentum", plain(SCALED, momentum=BETA), 0.0015, others_lr=0.02),
    "adamw-95": Method("AdamW, betas .9 and .95", ADAMW_95, 0.001, others_lr=0.02),
    "adamw-clip": Method("AdamW, clipped at 1", ADAMW, 0.001, others_lr=0.02, clip=1.0),
    "sign": Method("FRUGAL's signs", galore(residual="sign", moments="reset"), 0.005),
}
