"""The model and the tokenizer that a run starts from, and whether they fit each other, its task and the longest row."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from galore_torch.training.run.files import MANIFEST, require_whole
from galore_torch.training.run.model_files import encoder, require_length
from galore_torch.training.run.names import refused
from galore_torch.units import first_of


def load_tokenizer(config: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a token to pad with; the arguments and errors are those of `load_base`."""
    if config.gguf_file is not None and find_spec("gguf") is None:
        raise ImportError(f"gguf_file = {config.gguf_file!r} needs gguf. Install it with:  pip install gguf")
    if (Path(config.model) / MANIFEST).is_file():  # a run's model, which knows what it was
        require_whole("model", config.model, Path(config.model))
    with _readable(config):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(config.model, **_gguf(config))
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"model = {config.model!r}: its tokenizer has no token to pad with; set pad_token in its files."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    config: Any, kind: Any, longest: tuple[str, int], console: Console, **more: Any
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a model with its tokenizer, and print which of its weights are newly initialized.

    Args:
        config: a section of settings with ``model``, its name or folder, ``gguf_file`` and ``dtype``.
        kind: the auto class of the model.
        longest: the setting that says how many tokens a row has at most, and its value.
        console: where to print.
        more: for the model's configuration, such as ``num_labels``.

    Raises:
        ValueError: when they cannot be loaded or do not fit.
        ImportError: when a GGUF file needs a library that is missing.
    """
    tokenizer = load_tokenizer(config)
    packed = getattr(transformers, "GgufConfig", None)
    if config.gguf_file and packed is not None:  # newer versions keep its weights packed, and untrainable
        more["quantization_config"] = packed(dequantize=True)
    with _readable(config):
        model, info = kind.from_pretrained(
            config.model,
            dtype=getattr(torch, config.dtype),
            ignore_mismatched_sizes=True,  # a head for other labels is made anew
            output_loading_info=True,
            **_gguf(config),
            **more,
        )
    if kind is AutoModelForCausalLM:
        _require_causal(config.model, model)
    fresh = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if fresh:
        line = f"Some weights of {config.model} are newly initialized, since it has none that fit: {first_of(fresh, 4)}"
        console.out(line, highlight=False)
    _require_finite(config.model, model)
    _fit(config, model, tokenizer, longest)
    return model, tokenizer


def _readable(config: Any) -> AbstractContextManager[None]:
    damaged = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
    return refused(f"model = {config.model!r} cannot be loaded", "Give another.", damaged)


def _gguf(config: Any) -> dict[str, Any]:
    return {} if config.gguf_file is None else {"gguf_file": config.gguf_file}


def _require_causal(name: str, model: Any) -> None:
    """Refuse an encoder, which Transformers would make a causal model of that has learnt to look ahead."""
    kind = model.config.model_type
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(model.config, "is_decoder", False):
        raise encoder(name, kind)


def recompute_activations(model: Any) -> None:
    """Lets a model keep its layers' inputs alone, and its backward compute what is inside them again.

    Args:
        model: changed in place; a model in evaluation is not concerned.
    """
    # Transformers has renamed it, and warns of the older name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _require_finite(name: str, model: nn.Module) -> None:
    broken = [one for one, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())]
    if broken:
        raise ValueError(
            f"model = {name!r} has weights that are not finite: {first_of(broken, 4)}. Its training has failed, or its "
            "files are damaged; give another copy or an earlier checkpoint of it."
        )


def _fit(config: Any, model: Any, tokenizer: PreTrainedTokenizerBase, longest: tuple[str, int]) -> None:
    entries = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > entries:
        raise ValueError(
            f"model = {config.model!r} embeds {entries} tokens and its tokenizer has {len(tokenizer)}; give one that "
            "fits."
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    positions = _positions(model)
    if positions is not None:  # what it is saved with, so that whoever loads it can truncate by it
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
        require_length(*longest, config.model, positions)


def _positions(model: Any) -> int | None:
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from behind the padding's index.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return getattr(model.config, "max_position_embeddings", None)
