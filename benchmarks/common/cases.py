"""What is measured: an optimizer's step alone, or whole training steps of a LLaMA; its seconds and its memory.

A step alone is on weights of the true shapes with random gradients: there is no model and no data. A whole one is of a
model with random weights on random tokens. A published optimizer is measured in a process of its own, see `start`; so
is every one where they are to step in turn.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.common import bf16_products, measuring, peers
from benchmarks.common.floor import products, weights_with_gradients
from benchmarks.common.measuring import GIB, Call
from benchmarks.common.methods import LEARNING_RATE, Method
from benchmarks.common.rounds import Commands, Worker
from benchmarks.common.sizes import REHEARSAL, Llama

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

RARELY = 10**9
"""Steps between renewals where none is wanted."""

SVD_UP_TO = 2048
"""The hidden size up to which `figures` waits for the SVDs of galore-torch 1.0."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What steps, in which precision and where."""

    method: Method | None  # None is the floor of a step alone, what no implementation can do without
    size: Llama  # the model, or whose projected weights, with the rank and the gap
    dtype: str = "bfloat16"  # name of the torch dtype of weights and gradients
    device: str = "cpu"  # where it runs: cpu or cuda
    threads: int = 1  # of torch, in a process of its own

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        made: torch.dtype = getattr(torch, self.dtype)
        return made

    @property
    def title(self) -> str:
        """What steps, in words."""
        return f"LLaMA {self.size.hidden} wide, {self.size.layers} layers, {self.dtype}, rank {self.size.rank}"

    @property
    def folder(self) -> Path | None:
        """The one in which `peers` has installed the published package that the method is of, if it is of one."""
        return peers.installed(self.method.peer) if self.method and self.method.peer else None


@dataclass(frozen=True, kw_only=True)
class OptimizerStep(Case):
    """A step alone; weights are made when they are first needed."""

    stagger: bool = False  # whether our layers take turns to renew

    def start(self, name: str, folder: Path | None = None) -> Worker:
        """Start a process that answers "step" and "kept", or "figures".

        Args:
            name: What messages call it.
            folder: Where the published package lies; by default where `peers` installs it.
        """
        return Worker(name, replace(self).commands, folder or self.folder)  # nothing is made yet

    def commands(self) -> Commands:
        """Return what such a process serves."""
        torch.set_num_threads(self.threads)
        torch.set_grad_enabled(False)  # for good: there is nothing but optimizers here
        return {"step": self.step, "kept": self.kept, "figures": self.figures}

    @cached_property
    def _made(self) -> tuple[list[Tensor], dict[str, Call]]:
        """What was there before the optimizer, and the parts of a step."""
        in_int8 = self.method is not None and self.method.weight_bits == 8
        weights = weights_with_gradients(self.size.weights, self.torch_dtype, self.device, in_int8=in_int8)
        known = [*measuring.tensors_alive(), *(weight.grad for weight in weights if weight.grad is not None)]
        if self.method is None:
            return known, floor(weights, self.size.rank)
        return known, {"step": self.method.build(weights, [], self.size, stagger=self.stagger).step}

    @property
    def optimizer(self) -> Any:
        """The optimizer."""
        return self._made[1]["step"].__self__  # type: ignore[attr-defined]

    def step(self) -> dict[str, float]:
        """Take a step and return the seconds of its parts: `step_s` alone for an optimizer."""
        return measuring.seconds_by_part(self._made[1], self.device)

    def kept(self) -> dict[str, float]:
        """Return the bytes that are kept beside weights and gradients, those of single numbers apart."""
        held = measuring.held_bytes(self._made[0])
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
    measuring.clear(one.device)
    footprint, weights = measuring.Footprint(one.device), len(one.size.weights)
    step = one.optimizer.step
    figures = measuring.step_figures(step, one.device, footprint)
    figures["host_us_a_weight"] = 1e3 * figures["host_ms"] / weights
    if "kernels" in figures:
        figures["kernels_a_weight"] = figures["kernels"] / weights
    if one.method and one.method.ours:
        (group,) = one.optimizer.param_groups
        group["update_proj_gap"] = 1  # every weight renews its basis
        figures["renewal_s"] = measuring.seconds_of(step, one.device)
    figures["peak_GiB"] = max(figures["first_peak_GiB"], footprint.highest_bytes() / GIB)
    return figures


def _random_basis(_: Any, gradient: Tensor, rank: int, type: str) -> Tensor:
    """What galore-torch 1.0 keeps, orthonormal but not searched for."""
    side = gradient.shape[1] if type == "right" else gradient.shape[0]
    columns: Tensor = torch.linalg.qr(torch.randn(side, rank, device=gradient.device)).Q.to(gradient.dtype)
    return columns.mT.contiguous() if type == "right" else columns


def floor(weights: list[Tensor], rank: int) -> dict[str, Call]:
    """Return what no implementation can do without, part by part."""
    coordinates, bare = products(weights, rank)
    for coordinate in coordinates:
        coordinate.grad = torch.randn_like(coordinate)
    inner = torch.optim.AdamW(coordinates, lr=1e-3, fused=True).step
    return {
        "products": lambda: (bare["project"](), bare["project_back"]()),
        "inner": inner,
        "weights": lambda: [weight.mul_(0.9999) for weight in weights],
    }


@dataclass(frozen=True, kw_only=True)
class Training(Case):
    """What is trained, and how.

    Raises:
        ValueError: Tokens that are no whole number of batches, or gradients that would accumulate under a method that
            moves weights inside the backward pass.
    """

    name: str  # of the method, as tables have it
    method: Method
    tokens: int  # tokens in a step
    batch: int  # sequences at once; gradients accumulate until the step has its tokens
    learning_rate: float = LEARNING_RATE  # of every weight, constant
    stagger: bool = True  # whether our layers take turns to renew
    thrifty: bool = False  # whether a process of its own gives freed memory back at once

    def __post_init__(self) -> None:
        if self.tokens % (self.batch * self.size.sequence):
            raise ValueError(
                f"tokens is {self.tokens}, which is not a multiple of {self.batch} sequences of {self.size.sequence}; "
                "choose another number of tokens or another batch"
            )
        if self.micro_batches > 1 and self.method.update == "backward":
            raise ValueError(
                f"{self.name} moves weights inside the backward pass and cannot accumulate {self.micro_batches} "
                "batches; leave out --batch, or the method"
            )

    @property
    def micro_batches(self) -> int:
        """How many backward passes a step takes."""
        return self.tokens // (self.batch * self.size.sequence)

    @property
    def title(self) -> str:
        """What is trained, in words."""
        times = f"{self.micro_batches} times " if self.micro_batches > 1 else ""
        return f"{super().title}, {times}{self.batch} x {self.size.sequence} tokens a step"

    def case(self) -> dict[str, Any]:
        """Return all of it by name, sizes and method too, as bars have it."""
        return {**asdict(self.size), **asdict(self.method), **asdict(self)}

    def start(self) -> Worker:
        """Start a process of its own, which answers "step" and "kept"."""
        return Worker(self.name, self.commands, self.folder)

    def commands(self) -> Commands:
        """Return what such a process serves."""
        torch.set_num_threads(self.threads)
        if self.thrifty:
            measuring.give_back_at_once()
        bf16_products.in_float32()
        # Libraries load and set up at their first use what they need for good: that is not to count as the method's.
        Trained(replace(self, size=REHEARSAL, tokens=REHEARSAL.sequence, batch=1)).step()
        trained = Trained(self)
        return {"step": trained.step, "kept": trained.kept}

    def figures(self) -> dict[str, Any]:
        """Measure it as a device is measured: see `step_figures`; and tokens a second."""
        measuring.clear(self.device)
        trained = Trained(self)
        told = {"weights_GiB": measuring.stored_bytes(trained.model.parameters()) / GIB}
        told |= measuring.step_figures(partial(trained.take, trained.draw()), self.device, trained.footprint)
        return told | {"tokens_s": 1e3 * self.tokens / told["wall_ms"]}


class Trained:
    """A model under training."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.model = self.build().train()
        self._tokens = torch.Generator().manual_seed(0)
        self._at_start = measuring.tensors_alive()
        self.footprint = measuring.Footprint(training.device)
        keywords = {"lr": training.learning_rate, "stagger": training.stagger}
        self.optimizer, self._end_step = training.method.set_up(self.model, training.size, **keywords)

    def build(self) -> LlamaForCausalLM:
        """Return the model."""
        model = self.training.size.model(self.training.torch_dtype, self.training.device)
        if self.training.method.recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
        if self.training.method.weight_bits == 8:
            from galore_torch import quantize_weights

            quantize_weights(model)
        if self.training.method.compiles:
            for block in model.model.layers:  # compiling for a CPU takes long, and is not what is measured
                block.compile(backend="inductor" if self.training.device == "cuda" else "aot_eager")
        return model

    def draw(self) -> Tensor:
        """Return the tokens of the next step, where the model is: (sequences, length)."""
        size, tokens = self.training.size, self.training.tokens
        shape = (tokens // size.sequence, size.sequence)
        return torch.randint(size.vocabulary, shape, generator=self._tokens).to(self.training.device)

    def backward(self, ids: Tensor) -> None:
        """Go forward and backward, batch by batch."""
        for part in ids.chunk(self.training.micro_batches):
            (self.model(input_ids=part, labels=part).loss / self.training.micro_batches).backward()

    def take(self, ids: Tensor) -> None:
        """Take a step on these tokens; nothing is measured."""
        self.backward(ids)
        self._end_step()

    def step(self) -> dict[str, float]:
        """Take one step.

        Returns:
            `step_s`, its seconds; `peak_bytes`, the most memory above the weights during it; `gradient_bytes`, what the
            gradients take when the backward pass has ended.
        """
        device, ids = self.training.device, self.draw()
        self.footprint.forget()
        seconds = measuring.seconds_of(lambda: self.backward(ids), device)
        gradient_bytes = measuring.stored_bytes(weight.grad for weight in self.model.parameters())
        seconds += measuring.seconds_of(self._end_step, device)
        return {"step_s": seconds, "peak_bytes": self.footprint.peak_bytes(), "gradient_bytes": gradient_bytes}

    def kept(self) -> dict[str, float]:
        """Return what is kept between steps: the bytes of the weights and of the optimizer's state."""
        state_bytes = sum(measuring.held_bytes(self._at_start).values())
        return {"weight_bytes": measuring.stored_bytes(self.model.parameters()), "state_bytes": state_bytes}
