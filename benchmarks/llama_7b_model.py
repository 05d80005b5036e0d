"""What the LLaMA-7B benchmark trains, and how: the case, its model made layer by layer, its text and its optimizer."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.shapes import LlamaShapes
from galore_torch import GaLoreAdamW8bit, param_groups
from galore_torch.training.model import fresh_llama, recompute_activations
from galore_torch.training.presets import configure

Advance = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Training steps of a LLaMA in bfloat16 with 8-bit GaLore, each weight updated inside the backward.

    Attributes:
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        layers: Number of transformer blocks.
        heads: Number of attention heads.
        vocabulary: Number of tokens there are.
        rank: Rank of the projection.
        gap: Steps between renewals.
        tokens: Length of the one sequence of a step.
        gradients: How the projected weights' gradients are formed.
        basis_bits: In what bases are kept: 16, 8 or 4.
        weight_bits: In what attention and MLP weights are kept: 16 or 8.
        checkpointing: Whether the backward computes activations again.
        learning_rate: Constant.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    rank: int
    gap: int
    tokens: int
    gradients: Literal["full", "fused"]
    basis_bits: int
    weight_bits: int
    checkpointing: bool
    learning_rate: float

    @classmethod
    def of_preset(cls, *, layers: int | None = None, rank: int | None = None, **chosen: Any) -> "Case":
        """Return the case of the preset llama-7b.

        Args:
            layers: Fewer of them, to try; the preset's when None.
            rank: The preset's when None.
            **chosen: The fields that a preset does not tell.
        """
        config = configure("llama-7b")
        return cls(
            hidden=config.model.hidden,
            intermediate=config.model.intermediate,
            layers=layers or config.model.layers,
            heads=config.model.heads,
            vocabulary=config.data.vocab,
            rank=rank or config.optimizer.rank,
            gap=config.optimizer.gap,
            **chosen,
        )

    @property
    def shapes(self) -> LlamaShapes:
        """The weights that are projected."""
        return LlamaShapes(hidden=self.hidden, intermediate=self.intermediate, layers=self.layers, rank=self.rank)

    @property
    def other_elements(self) -> int:
        """Numbers in what is not projected: embeddings, head and norms."""
        return 2 * self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden

    @property
    def weight_count(self) -> int:
        """How many parameters there are, projected or not: each has its moment in a backward."""
        return 7 * self.layers + 2 + 2 * self.layers + 1

    def architecture(self, layers: int | None = None) -> LlamaConfig:
        """Return Transformers' configuration, with other layers if asked for."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers if layers is None else layers,
            num_attention_heads=self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=max(1024, self.tokens),
            use_cache=False,
        )


def build_model(case: Case, advance: Advance = lambda: None) -> LlamaForCausalLM:
    """Return the model with random weights. No more than a layer of it is ever there twice.

    Args:
        case: What to build.
        advance: Called for each layer.
    """
    torch.manual_seed(0)
    seeds = iter(range(case.layers))

    def made(module: nn.Module) -> None:
        if isinstance(module, LlamaDecoderLayer):
            if case.weight_bits == 8:
                _quantize(module, next(seeds))
            advance()

    model = fresh_llama(case.architecture(), torch.bfloat16, made)
    if case.checkpointing:
        recompute_activations(model)
    return model


def _quantize(layer: nn.Module, seed: int) -> None:
    from galore_torch import quantize_weights

    quantize_weights(layer, target_modules=("attn", "mlp"), seed=seed)


def build_optimizer(model: LlamaForCausalLM, case: Case) -> GaLoreAdamW8bit:
    """Return 8-bit GaLore over all of the model: attention and MLP projected, the others as they are."""
    groups = param_groups(model, case.rank, update_proj_gap=case.gap, basis_bits=case.basis_bits)
    return GaLoreAdamW8bit(groups, lr=case.learning_rate)


def real_text(case: Case) -> Tensor:
    """Return the beginning of one of Python's own sources, a byte a token: (1, tokens).

    Raises:
        ValueError: More tokens than it has, or fewer entries than there are bytes.
    """
    source = Path(argparse.__file__).read_bytes()
    if case.tokens > len(source):
        raise ValueError(f"tokens is {case.tokens}, and there are {len(source):,}; ask for fewer")
    if case.vocabulary < 256:
        raise ValueError(f"vocabulary is {case.vocabulary}; bytes need 256")
    return torch.tensor([list(source[: case.tokens])])
