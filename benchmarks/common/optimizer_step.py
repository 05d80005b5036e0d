"""One optimizer's step on weights of the true shapes with random gradients: there is no model and no data.

A published optimizer is measured in a process of its own, see `start`; so is every one where they are to step in turn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import peers
from benchmarks.common.floor import Bare, weights_with_gradients
from benchmarks.common.measuring import (
    GIB,
    Call,
    Footprint,
    clear,
    held_bytes,
    seconds_by_part,
    seconds_of,
    step_figures,
    tensors_alive,
)
from benchmarks.common.methods import Method
from benchmarks.common.rounds import Commands, Worker
from benchmarks.common.sizes import Llama

RARELY = 10**9
"""Steps between renewals where none is wanted."""

SVD_UP_TO = 2048
"""The hidden size up to which `figures` waits for the SVDs of galore-torch 1.0."""


@dataclass(frozen=True, kw_only=True)
class OptimizerStep:
    """What steps, and on which weights, which are made when they are first needed."""

    method: Method | None  # None is the floor, what no implementation can do without
    size: Llama  # whose projected weights, with the rank and the gap
    dtype: str = "bfloat16"  # name of the torch dtype of weights and gradients
    device: str = "cpu"  # cpu or cuda
    stagger: bool = False  # whether our layers take turns to renew
    threads: int = 1  # of torch, in a process of its own

    def start(self, name: str, folder: Path | None = None) -> Worker:
        """Start a process that answers "step" and "kept", or "figures".

        Args:
            name: What messages call it.
            folder: Where the published package lies; by default where `peers` installs it.
        """
        if folder is None and self.method and self.method.peer:
            folder = peers.installed(self.method.peer)
        return Worker(name, replace(self).commands, folder)  # nothing is made yet

    def commands(self) -> Commands:
        """Return what such a process serves."""
        torch.set_num_threads(self.threads)
        torch.set_grad_enabled(False)  # for good: there is nothing but optimizers here
        return {"step": self.step, "kept": self.kept, "figures": self.figures}

    @cached_property
    def _made(self) -> tuple[list[Tensor], dict[str, Call]]:
        """What was there before the optimizer, and the parts of a step."""
        in_int8 = self.method is not None and self.method.weight_bits == 8
        weights = weights_with_gradients(self.size.weights, getattr(torch, self.dtype), self.device, in_int8=in_int8)
        known = [*tensors_alive(), *(weight.grad for weight in weights if weight.grad is not None)]
        if self.method is None:
            return known, floor(weights, self.size.rank)
        return known, {"step": self.method.build(weights, [], self.size, stagger=self.stagger).step}

    @property
    def optimizer(self) -> Any:
        """The optimizer."""
        return self._made[1]["step"].__self__  # type: ignore[attr-defined]

    def step(self) -> dict[str, float]:
        """Take a step and return the seconds of its parts: `step_s` alone for an optimizer."""
        return seconds_by_part(self._made[1], self.device)

    def kept(self) -> dict[str, float]:
        """Return the bytes that are kept beside weights and gradients, those of single numbers apart."""
        held = held_bytes(self._made[0])
        return {"state_bytes": held["state"], "counter_bytes": held["counters"]}

    def figures(self) -> dict[str, Any]:
        """Measure all at once, as a device is measured.

        galore-torch 1.0 finds its bases by SVDs, which take minutes for a large model. So its first step is made on one
        layer and counted as often as there are layers; its ordinary steps are of all layers, with random bases.

        Returns:
            Those of `step_figures`, weights and gradients included; `renewal_s` (of all weights; ours, from bases that
            are there), and times and kernels a weight.
        """
        if self.method is None or self.method.peer is not peers.GALORE_1:
            return _figures(self)
        from galore_torch.galore_projector import GaLoreProjector

        renewal, size = {}, self.size
        if size.hidden <= SVD_UP_TO:
            renewal["renewal_s"] = _figures(replace(self, size=replace(size, layers=1)))["first_s"] * size.layers
        GaLoreProjector.get_orthogonal_matrix = _random_basis  # type: ignore[attr-defined]
        return _figures(self) | renewal


def _figures(one: OptimizerStep) -> dict[str, Any]:
    clear(one.device)
    footprint, weights = Footprint(one.device), len(one.size.weights)
    step = one.optimizer.step
    figures = step_figures(step, one.device, footprint)
    figures["host_us_a_weight"] = 1e3 * figures["host_ms"] / weights
    if "kernels" in figures:
        figures["kernels_a_weight"] = figures["kernels"] / weights
    if one.method and one.method.ours:
        (group,) = one.optimizer.param_groups
        group["update_proj_gap"] = 1  # every weight renews its basis
        figures["renewal_s"] = seconds_of(step, one.device)
    figures["peak_GiB"] = max(figures["first_peak_GiB"], footprint.highest_bytes() / GIB)
    return figures


def _random_basis(_: Any, gradient: Tensor, rank: int, type: str) -> Tensor:
    """What galore-torch 1.0 keeps, orthonormal but not searched for."""
    side = gradient.shape[1] if type == "right" else gradient.shape[0]
    columns: Tensor = torch.linalg.qr(torch.randn(side, rank, device=gradient.device)).Q.to(gradient.dtype)
    return columns.mT.contiguous() if type == "right" else columns


def floor(weights: list[Tensor], rank: int) -> dict[str, Call]:
    """Return what no implementation can do without, part by part."""
    bare, updates = Bare(weights, rank), [torch.empty_like(weight) for weight in weights]
    for coordinate in bare.coordinates:
        coordinate.grad = torch.randn_like(coordinate)

    def products() -> None:
        bare.project()
        bare.project_back(updates)

    def read_and_write_weights() -> None:
        for weight in weights:
            weight.mul_(0.9999)

    inner = torch.optim.AdamW(bare.coordinates, lr=1e-3, fused=True).step
    return {"products": products, "inner": inner, "weights": read_and_write_weights}
