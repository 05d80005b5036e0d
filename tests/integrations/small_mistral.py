"""A small Mistral, a tokenizer and text that are on every machine: the standard library's sources."""

import functools
import inspect
import json
import textwrap

import datasets
import tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast, set_seed

SEQUENCE = 32


@functools.cache
def documents() -> list[str]:
    """Return pieces of the sources of some modules."""
    sources = "".join(inspect.getsource(module) for module in (json, json.decoder, json.encoder, textwrap))
    return [piece for piece in sources.split("\n\n") if len(piece) > 100]


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 300 pieces, trained on the documents."""
    trained = tokenizers.Tokenizer(BPE())
    trained.pre_tokenizer = ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator(documents(), trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=trained, **names)


def assert_falls(losses: list[float], by: float = 0.3) -> None:
    """Demand that the last losses lie below the first.

    Batches of a model that learns nothing differ by some hundredths. Over processors' kernels, threads and seeds the
    losses fell by more than twice of what is demanded.
    """
    assert sum(losses[-3:]) / 3 < losses[0] - by


def preferences() -> datasets.Dataset:
    """Return pieces of the documents that are to be answered by the next one, not by one that is written backwards."""
    pieces = [piece[:60] for piece in documents()]
    rows = zip(pieces, pieces[1:], pieces[2:], strict=False)
    return datasets.Dataset.from_list(
        [{"prompt": one, "chosen": two, "rejected": three[::-1]} for one, two, three in rows]
    )


def text() -> datasets.Dataset:
    """Return the documents as rows with a column `text`."""
    return datasets.Dataset.from_dict({"text": documents()})


@functools.cache
def blocks() -> datasets.Dataset:
    """Return the documents as token sequences of equal length, to be learnt by heart."""
    ids = [token for piece in documents() for token in tokenizer()(piece)["input_ids"]]
    rows = [ids[start : start + SEQUENCE] for start in range(0, len(ids) - SEQUENCE, SEQUENCE)]
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})


def mistral() -> MistralForCausalLM:
    """Return the same untrained model at every call. At rank 8 its MLP's moments are large enough for 8-bit states."""
    set_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=SEQUENCE,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
