"""What the LLaMA-7B benchmark trains, and how: the case, its model made layer by layer, and its text."""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.common.methods import Method
from benchmarks.common.sizes import Llama
from galore_torch import quantize_weights
from galore_torch.training.pretrain.model import fresh_llama, recompute_activations

Advance = Callable[[], None]
"""Called after each part, for a progress bar."""


@dataclass(frozen=True, kw_only=True)
class TrainingCase:
    """Training steps of a LLaMA in bfloat16 on one sequence of real text, at a constant learning rate."""

    size: Llama
    method: Method
    learning_rate: float

    @property
    def title(self) -> str:
        """What is trained, in words."""
        size, method = self.size, self.method
        return (
            f"LLaMA {size.hidden} wide, {size.layers} layers, {method.weight_bits}-bit weights, "
            f"{method.basis_bits}-bit bases, rank {size.rank}, {method.gradients} gradients, {size.sequence} tokens"
            f"{', recomputing activations' * method.recomputes}"
        )

    def record(self) -> dict[str, Any]:
        """Return all of it by name, as JSON and the bars have it."""
        rest = {"tokens": self.size.sequence, "learning_rate": self.learning_rate}
        return {**asdict(self.size), **asdict(self.method), **rest}


def build_model(case: TrainingCase, advance: Advance = lambda: None) -> LlamaForCausalLM:
    """Return the model with random weights, no more than a layer of which is ever there unquantized."""
    torch.manual_seed(0)
    seeds = iter(range(case.size.layers))

    def made(module: nn.Module) -> None:
        if isinstance(module, LlamaDecoderLayer):
            if case.method.weight_bits == 8:
                quantize_weights(module, target_modules=("attn", "mlp"), seed=next(seeds))
            advance()

    model = fresh_llama(case.size.architecture(), torch.bfloat16, made)
    if case.method.recomputes:
        recompute_activations(model)
    return model


def real_text(size: Llama) -> Tensor:
    """Return the beginning of one of Python's own sources, a byte a token: (1, sequence).

    Raises:
        ValueError: More tokens than it has, or fewer entries than there are bytes.
    """
    source = Path(argparse.__file__).read_bytes()
    if size.sequence > len(source):
        raise ValueError(f"tokens is {size.sequence}, and there are {len(source):,}; ask for fewer")
    if size.vocabulary < 256:
        raise ValueError(f"vocabulary is {size.vocabulary}; bytes need 256")
    return torch.tensor([list(source[: size.sequence])])
