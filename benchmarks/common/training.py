"""Whole training steps of a LLaMA with random weights on random tokens: their seconds, and memory at its highest."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.common import bf16_products, peers
from benchmarks.common.measuring import (
    GIB,
    Footprint,
    clear,
    give_back_at_once,
    held_bytes,
    seconds_of,
    step_figures,
    stored_bytes,
    tensors_alive,
)
from benchmarks.common.methods import LEARNING_RATE, Method
from benchmarks.common.rounds import Commands, Worker
from benchmarks.common.sizes import REHEARSAL, Llama

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained, and how.

    Raises:
        ValueError: Tokens that are no whole number of batches, or gradients that would accumulate under a method that
            moves weights inside the backward pass.
    """

    name: str  # of the method, as tables have it
    method: Method
    size: Llama  # the model
    tokens: int  # tokens in a step
    batch: int  # sequences at once; gradients accumulate until the step has its tokens
    learning_rate: float = LEARNING_RATE  # of every weight, constant
    stagger: bool = True  # whether our layers take turns to renew
    dtype: str = "bfloat16"  # name of the torch dtype of the weights
    device: str = "cpu"  # where it runs: cpu or cuda
    threads: int = 1  # threads of torch, in a process of its own
    thrifty: bool = False  # whether that process gives freed memory back at once

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
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        made: torch.dtype = getattr(torch, self.dtype)
        return made

    @property
    def micro_batches(self) -> int:
        """How many backward passes a step takes."""
        return self.tokens // (self.batch * self.size.sequence)

    @property
    def title(self) -> str:
        """What is trained, in words."""
        size, times = self.size, f"{self.micro_batches} times " if self.micro_batches > 1 else ""
        return (
            f"LLaMA {size.hidden} wide, {size.layers} layers, {self.dtype}, rank {size.rank}, "
            f"{times}{self.batch} x {size.sequence} tokens a step"
        )

    def case(self) -> dict[str, Any]:
        """Return all of it by name, sizes and method too, as bars have it."""
        return {**asdict(self.size), **asdict(self.method), **asdict(self)}

    def start(self) -> Worker:
        """Start a process of its own, which answers "step" and "kept"."""
        return Worker(self.name, self.commands, peers.installed(self.method.peer) if self.method.peer else None)

    def commands(self) -> Commands:
        """Return what such a process serves."""
        torch.set_num_threads(self.threads)
        if self.thrifty:
            give_back_at_once()
        bf16_products.in_float32()
        # Libraries load and set up at their first use what they need for good: that is not to count as the method's.
        Trained(replace(self, size=REHEARSAL, tokens=REHEARSAL.sequence, batch=1)).step()
        trained = Trained(self)
        return {"step": trained.step, "kept": trained.kept}

    def figures(self) -> dict[str, Any]:
        """Measure it as a device is measured: see `step_figures`; and tokens a second."""
        clear(self.device)
        trained = Trained(self)
        told = {"weights_GiB": stored_bytes(trained.model.parameters()) / GIB}
        told |= step_figures(partial(trained.take, trained.draw()), self.device, trained.footprint)
        return told | {"tokens_s": 1e3 * self.tokens / told["wall_ms"]}


class Trained:
    """A model under training."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.model = self.build().train()
        self._tokens = torch.Generator().manual_seed(0)
        self._at_start = tensors_alive()
        self.footprint = Footprint(training.device)
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
        seconds = seconds_of(lambda: self.backward(ids), device)
        gradient_bytes = stored_bytes(weight.grad for weight in self.model.parameters())
        seconds += seconds_of(self._end_step, device)
        return {"step_s": seconds, "peak_bytes": self.footprint.peak_bytes(), "gradient_bytes": gradient_bytes}

    def kept(self) -> dict[str, float]:
        """Return what is kept between steps: the bytes of the weights and of the optimizer's state."""
        state_bytes = sum(held_bytes(self._at_start).values())
        return {"weight_bytes": stored_bytes(self.model.parameters()), "state_bytes": state_bytes}
