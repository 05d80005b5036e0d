"""A LLaMA with fresh weights, made one layer at a time in the dtype that it is trained in: never two copies of it.

Transformers' constructor makes every weight in float32, 27 GB of LLaMA-7B, before any can be cast. Here no more than
one weight is float32 at a time. What is drawn is what the constructor draws.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from galore_torch.lowbit import quantize_weights
from galore_torch.training.pretrain.config import PretrainConfig
from galore_torch.training.run.units import sentence
from galore_torch.training.text.tokenizer import entries


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """The LLaMA of a pre-training, with fresh weights from torch's global random state.

    Args:
        config: its sizes and its dtype; its matrices are in few bits if the settings say so.
        tokenizer: how many embeddings it needs, and which tokens are special.

    Returns:
        The model, on the CPU.
    """
    architecture = LlamaConfig(
        hidden_size=config.model.hidden,
        intermediate_size=config.model.intermediate,
        num_hidden_layers=config.model.layers,
        num_attention_heads=config.model.heads,
        vocab_size=entries(tokenizer),
        max_position_embeddings=max(1024, config.data.seq),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
    )
    model = fresh_llama(architecture, getattr(torch, config.model.dtype), _quantizer(config))
    if config.schedule.gradient_checkpointing:
        recompute_activations(model)
    return model


def _quantizer(config: PretrainConfig) -> Callable[[nn.Module], None]:
    """What quantizes each layer as soon as it stands, with random numbers of its own, if the settings say so."""
    if config.optimizer.weight_bits == 16:
        return lambda _: None
    seeds = itertools.count(config.schedule.seed * 1_000_003)
    stochastic = config.optimizer.weight_rounding == "stochastic"

    def made(module: nn.Module) -> None:
        if isinstance(module, LlamaDecoderLayer):
            quantize_weights(module, stochastic_rounding=stochastic, seed=next(seeds))

    return made


def load_llama(folder: Path, config: PretrainConfig) -> LlamaForCausalLM:
    """The LLaMA of a pre-training, with the weights that were saved in a folder; a ValueError says why it is not."""
    try:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, config.model.dtype))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:  # whatever files can be wrong in
        raise ValueError(f"run: {str(folder)!r} cannot be loaded: {sentence(error)}") from error
    model.config.use_cache = False
    if config.schedule.gradient_checkpointing:
        recompute_activations(model)
    return model


def recompute_activations(model: LlamaForCausalLM) -> None:
    """Lets a model keep its layers' inputs alone, and its backward compute what is inside them again.

    Args:
        model: changed in place; a model in evaluation is not concerned.
    """
    # Transformers has renamed it, and warns of the older name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def fresh_llama(
    architecture: LlamaConfig, dtype: torch.dtype, made: Callable[[nn.Module], None] = lambda _: None
) -> LlamaForCausalLM:
    """A LLaMA whose weights are those of `LlamaForCausalLM(architecture)` at torch's global random state, cast.

    Buffers keep float32: positions would be wrong in bfloat16, and a model that is loaded again has them exact.

    Args:
        architecture: Transformers' configuration; head and embeddings not tied.
        dtype: of the weights.
        made: called with each module once all in it stands, the innermost first: to show progress, or to quantize a
            layer before the next is made.

    Returns:
        The model, on the CPU.

    Example:
        >>> tiny = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = fresh_llama(LlamaConfig(**tiny, vocab_size=32), torch.bfloat16)
        >>> model.lm_head.weight.dtype, model.model.rotary_emb.inv_freq.dtype
        (torch.bfloat16, torch.float32)
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(architecture)
    for part in (model.model, model.lm_head):  # each draws for itself, when it is constructed
        for module in part.modules():
            _draw_in_vain(module)
        _fill(part, model, dtype, made)
    made(model)
    return model


def _draw_in_vain(module: nn.Module) -> None:
    """Draws as torch's constructors do before Transformers draws over it."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        copy.deepcopy(module).to_empty(device="cpu").reset_parameters()


@torch.no_grad()
def _fill(module: nn.Module, model: LlamaForCausalLM, dtype: torch.dtype, made: Callable[[nn.Module], None]) -> None:
    for child in module.children():
        _fill(child, model, dtype, made)
    module.to_empty(device="cpu", recurse=False)
    model._init_weights(module)  # type: ignore[no-untyped-call]
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.to(dtype)
    made(module)
