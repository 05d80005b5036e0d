"""Whole training steps of a LLaMA with random weights on random tokens: tokens a second, and memory at its highest."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from benchmarks.device.session import Figures, Session
from benchmarks.device.sizes import Size, sizes
from benchmarks.device.timing import clear, held_gib, kernels, peak_gib, seconds_of, timed
from galore_torch import GaLoreAdamW, GaLoreAdamW8bit, attach, param_groups, quantize_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

GAP = 200


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way of training.

    Attributes:
        gradients: As `attach` has it; None for fused AdamW.
        update: As `attach` has it.
        state_bits: 8 for bitsandbytes' states.
        weight_bits: 8 for INT8 weights.
        recomputes: Whether the backward computes activations again.
    """

    gradients: Literal["full", "projected", "fused"] | None
    update: Literal["step", "backward"] = "step"
    state_bits: int = 16
    weight_bits: int = 16
    recomputes: bool = False

    @property
    def name(self) -> str:
        """What tables call it."""
        words = ["AdamW, fused"] if self.gradients is None else [f"{self.gradients}/{self.update}"]
        words += ["8-bit states"] * (self.state_bits == 8) + ["INT8 weights"] * (self.weight_bits == 8)
        return ", ".join(words + ["activations recomputed"] * self.recomputes)


ADAMW = Way(gradients=None)
IN_BACKWARD = Way(gradients="fused", update="backward")
SMALLEST = 8 if find_spec("bitsandbytes") else 16
PLAN: dict[str, list[Way]] = {
    "350m": [
        ADAMW,
        Way(gradients="fused"),
        IN_BACKWARD,
        Way(gradients="full"),
        Way(gradients="projected"),
        Way(gradients="full", update="backward"),
    ],
    "7b": [
        Way(gradients="fused", update="backward", state_bits=SMALLEST, recomputes=True),
        Way(gradients="fused", update="backward", state_bits=SMALLEST, weight_bits=8, recomputes=True),
    ],
    "1b": [ADAMW, Way(gradients="fused"), IN_BACKWARD, Way(gradients="full"), Way(gradients="projected")],
}
"""The most telling first: what comes after the time is up is left out."""
REST: dict[str, list[Way]] = {
    "350m": [
        Way(gradients="fused", update="backward", weight_bits=8),
        Way(gradients="fused", update="backward", state_bits=SMALLEST),
    ],
    "7b": [IN_BACKWARD, Way(gradients=None, recomputes=True)],
}
NEEDS_S = {"7b": 45.0, "1b": 15.0}
"""Seconds that a row takes, about; others take 8."""


def measure(session: Session) -> None:
    """Tell the figures of each model trained in each way."""
    for plan in (PLAN, REST):
        for name, ways in plan.items():
            for way in ways if name in sizes(session.small) else ():
                size = sizes(session.small)[name]
                session.try_row(
                    f"{name}, {way.name}", partial(_figures, session.device, size, way), needs_s=NEEDS_S.get(name, 8.0)
                )


def _figures(device: str, size: Size, way: Way) -> Figures:
    clear(device)
    model = _model(size, way, device)
    figures: Figures = {"weights_GiB": held_gib(device)}
    step = _step(model, size, way, device)
    figures["first_s"] = seconds_of(step, device)
    figures["first_peak_GiB"] = peak_gib(device)
    clear(device)
    figures |= timed(step, device)
    figures["tokens_s"] = 1e3 * size.tokens / figures["wall_ms"]
    figures["peak_GiB"] = peak_gib(device)
    figures |= kernels(step, device)
    return figures


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _model(size: Size, way: Way, device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size.shapes.hidden,
        intermediate_size=size.shapes.intermediate,
        num_hidden_layers=size.shapes.layers,
        num_attention_heads=size.heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=max(2048, size.sequence),
        use_cache=False,
    )
    torch.manual_seed(0)
    with _default_dtype(torch.bfloat16), torch.device(device):
        model = LlamaForCausalLM(config)
    if way.recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
    if way.weight_bits == 8:
        quantize_weights(model)
    trained: nn.Module = model.train()
    return trained


def _step(model: nn.Module, size: Size, way: Way, device: str) -> Callable[[], Any]:
    optimizer: torch.optim.Optimizer
    if way.gradients is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    else:
        made = GaLoreAdamW8bit if way.state_bits == 8 else GaLoreAdamW
        galore = made(param_groups(model, size.shapes.rank, update_proj_gap=GAP), lr=1e-4)
        attach(model, galore, way.gradients, way.update)
        optimizer = galore
    shape = (size.tokens // size.sequence, size.sequence)
    tokens = torch.randint(0, size.vocabulary, shape, generator=torch.Generator().manual_seed(0)).to(device)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
