"""Whole training steps of a LLaMA with random weights on random tokens: tokens a second, and memory at its highest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from benchmarks.common.memory import clear, held_gib, peak_gib
from benchmarks.common.methods import METHODS, REFERENCE, Method, set_up
from benchmarks.common.sizes import Llama
from benchmarks.common.timing import kernels, seconds_of, timed
from benchmarks.device.session import Figures, Session
from benchmarks.device.sizes import sizes
from galore_torch import quantize_weights

SMALLEST = 8 if find_spec("bitsandbytes") else 16
ADAMW, FULL, PROJECTED, FUSED, FULL_IN_BACKWARD, IN_BACKWARD = (
    METHODS[name]
    for name in (REFERENCE, "full/step", "projected/step", "fused/step", "full/backward", "fused/backward")
)
LEAST = replace(IN_BACKWARD, state_bits=SMALLEST, recomputes=True)
PLAN: dict[str, list[Method]] = {
    "350m": [ADAMW, FUSED, IN_BACKWARD, FULL, PROJECTED, FULL_IN_BACKWARD],
    "7b": [LEAST, replace(LEAST, weight_bits=8)],
    "1b": [ADAMW, FUSED, IN_BACKWARD, FULL, PROJECTED],
}
"""The most telling first: what comes after the time is up is left out."""
REST: dict[str, list[Method]] = {
    "350m": [replace(IN_BACKWARD, weight_bits=8), replace(IN_BACKWARD, state_bits=SMALLEST)],
    "7b": [IN_BACKWARD, replace(ADAMW, recomputes=True)],
}
NEEDS_S = {"7b": 45.0, "1b": 15.0}
"""Seconds that a row takes, about; others take 8."""


def measure(session: Session) -> None:
    """Tell the figures of each model trained in each way."""
    known = sizes(session.small)
    for name, methods in [*PLAN.items(), *REST.items()]:
        sequences = 2 if session.small else {"7b": 1}.get(name, 8)
        for method in methods if name in known else ():
            one = partial(_figures, session.device, known[name], sequences, method)
            session.try_row(f"{name}, {_words(method)}", one, needs_s=NEEDS_S.get(name, 8.0))


def _words(method: Method) -> str:
    words = ["AdamW, fused" if method.gradients == "full rank" else f"{method.gradients}/{method.update}"]
    words += ["8-bit states"] * (method.state_bits == 8) + ["INT8 weights"] * (method.weight_bits == 8)
    return ", ".join(words + ["activations recomputed"] * method.recomputes)


def _figures(device: str, size: Llama, sequences: int, method: Method) -> Figures:
    clear(device)
    model = _model(size, method, device)
    figures: Figures = {"weights_GiB": held_gib(device)}
    step = _step(model, size, sequences, method, device)
    figures["first_s"] = seconds_of(step, device)
    figures["first_peak_GiB"] = peak_gib(device)
    clear(device)
    figures |= timed(step, device)
    figures["tokens_s"] = 1e3 * sequences * size.sequence / figures["wall_ms"]
    figures["peak_GiB"] = peak_gib(device)
    figures |= kernels(step, device)
    return figures


def _model(size: Llama, method: Method, device: str) -> nn.Module:
    model = size.model(torch.bfloat16, device)
    if method.recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
    if method.weight_bits == 8:
        quantize_weights(model)
    trained: nn.Module = model.train()
    return trained


def _step(model: nn.Module, size: Llama, sequences: int, method: Method, device: str) -> Callable[[], Any]:
    close = set_up(model, size, method)
    shape = (sequences, size.sequence)
    tokens = torch.randint(0, size.vocabulary, shape, generator=torch.Generator().manual_seed(0)).to(device)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        close()

    return step
