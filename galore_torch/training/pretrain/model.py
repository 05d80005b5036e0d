"""The model of a pre-training: one that is named, or fresh weights, of a LLaMA or of another architecture.

A LLaMA with fresh weights is made one layer at a time in the dtype that it is trained in: never two copies of it.

Transformers' constructor makes every weight in float32, 27 GB of LLaMA-7B, before any can be cast. Here no more than
one weight is float32 at a time. What is drawn is what the constructor draws.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from galore_torch.lowbit import quantize_weights
from galore_torch.training.pretrain.config import SIZES, PretrainConfig
from galore_torch.training.run.base_model import load_base, recompute_activations
from galore_torch.training.run.names import refused
from galore_torch.training.settings.optimizer import MATRICES


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase, console: Console) -> Any:
    """The model of a pre-training: the one that is named, or one with fresh weights from torch's global random state.

    Args:
        config: which, its dtype, and whether its matrices are in few bits.
        tokenizer: how many embeddings fresh weights need, and which tokens are special.
        console: where to print what a loaded model lacks.

    Returns:
        The model, on the CPU.

    Raises:
        ValueError: when what is named cannot be loaded, is no causal model or has too few positions for a sequence.
    """
    dtype, seed = getattr(torch, config.model.dtype), config.schedule.seed
    quantized, stochastic = config.optimizer.weight_bits == 8, config.optimizer.weight_rounding == "stochastic"
    seeds = itertools.count(seed * 1_000_003)  # random numbers of its own for each layer

    def made(module: nn.Module) -> None:
        if quantized and isinstance(module, LlamaDecoderLayer):
            quantize_weights(module, stochastic_rounding=stochastic, seed=next(seeds))

    if config.model.model is not None:
        model, _ = load_base(config.model, AutoModelForCausalLM, ("seq", config.data.seq), console)
    else:
        architecture = _architecture(config, tokenizer)
        tokenizer.model_max_length = architecture.max_position_embeddings
        if config.model.config_of is None:
            model = fresh_llama(architecture, dtype, made)
        else:
            with refused(f"config_of = {config.model.config_of!r} makes no model", "Mend it, or give another."):
                model = AutoModelForCausalLM.from_config(architecture, dtype=dtype)  # type: ignore[no-untyped-call]
    if quantized and (config.model.model or config.model.config_of):
        quantize_weights(model, MATRICES, stochastic_rounding=stochastic, seed=seed)
    model.config.use_cache = False
    if config.schedule.gradient_checkpointing:
        recompute_activations(model)
    return model


def llama_sizes(config: PretrainConfig, **tokens: Any) -> LlamaConfig:
    """Transformers' configuration of the LLaMA of a pre-training.

    Args:
        config: its sizes.
        tokens: ``vocab_size``, and ids of special tokens.
    """
    named = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes: dict[str, Any] = {name: getattr(config.model, size) for name, size in zip(named, SIZES, strict=True)}
    return LlamaConfig(**sizes, max_position_embeddings=max(1024, config.data.seq), use_cache=False, **tokens)


def entries(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many embeddings a model needs: the highest token that text can give, plus one.

    T5's tokenizer ends in 100 sentinels that no text gives, so the paper's models have 32,000 embeddings, not 32,100.
    """
    text_specials = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token}
    sentinels = set(tokenizer.all_special_tokens) - text_specials
    return 1 + max(index for token, index in tokenizer.get_vocab().items() if token not in sentinels)


def _architecture(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The configuration of a model with fresh weights, which fits tokenizer and sequences."""
    given = {
        "vocab_size": entries(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    name = config.model.config_of
    if name is None:
        return llama_sizes(config, **given)
    remedy = "Give a name on the Hub, a folder or a config.json."
    with refused(f"config_of = {name!r} cannot be loaded", remedy):
        architecture = AutoConfig.from_pretrained(name)
    if architecture.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"config_of = {name!r} is a {architecture.model_type}, not a causal model; give one of those.")
    for key, value in given.items():
        setattr(architecture, key, value)
    architecture.max_position_embeddings = max(architecture.max_position_embeddings, config.data.seq)
    return architecture


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
            if isinstance(module, (nn.Linear, nn.Embedding)):  # torch's own draw, over which Transformers draws
                copy.deepcopy(module).to_empty(device="cpu").reset_parameters()
        _fill(part, model, dtype, made)
    made(model)
    return model


@torch.no_grad()
def _fill(module: nn.Module, model: LlamaForCausalLM, dtype: torch.dtype, made: Callable[[nn.Module], None]) -> None:
    for child in module.children():
        _fill(child, model, dtype, made)
    module.to_empty(device="cpu", recurse=False)
    model._init_weights(module)  # type: ignore[no-untyped-call]
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.to(dtype)
    made(module)
