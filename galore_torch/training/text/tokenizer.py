"""Which tokenizer cuts the documents: a byte-level BPE trained on the spot, or a ready one by name or folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from galore_torch.training.text.caches import kept
from galore_torch.training.text.config import DataConfig
from galore_torch.training.text.sources import Corpus
from galore_torch.units import sentence

END_OF_TEXT = "<|endoftext|>"
"""Ends every document; the one special token of a tokenizer trained here."""

_PAPER_TOKENIZER = "t5-base"
_TRAINING_DOCUMENTS = 20_000
_TRAINING_CHARACTERS = 32 * 2**20


def tokenizer_for(corpus: Corpus, config: DataConfig, cache: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that ``config.tokenizer`` asks for; one that is trained sees no held-out document.

    Raises:
        ValueError: when a ready tokenizer cannot be loaded or has no token that ends a document.
    """
    name = config.tokenizer
    if name == "auto":
        name = _PAPER_TOKENIZER if corpus.streamed else "train"
    if name == "train":
        return _trained(corpus, config.vocab, cache)
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # missing, offline, gated, not a tokenizer: the Hub's client raises errors of many kinds
        raise ValueError(
            f"tokenizer = {name!r} cannot be loaded: {sentence(error)} Check the name and the network, or give train."
        ) from error


def _trained(corpus: Corpus, vocab: int, cache: Path) -> PreTrainedTokenizerBase:
    texts = list(_sample(corpus))
    key = hashlib.sha256(json.dumps([vocab, END_OF_TEXT, texts]).encode()).hexdigest()[:16]
    with kept(cache / "tokenizers" / key) as folder:
        if not any(folder.iterdir()):
            bpe = ByteLevelBPETokenizer()
            bpe.train_from_iterator(
                texts, vocab_size=vocab, min_frequency=0, special_tokens=[END_OF_TEXT], show_progress=False
            )
            PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
                tokenizer_object=Tokenizer.from_str(bpe.to_str()),
                bos_token=END_OF_TEXT,
                eos_token=END_OF_TEXT,
                pad_token=END_OF_TEXT,
            ).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


def _sample(corpus: Corpus) -> Iterator[str]:
    characters = 0
    for row in islice(corpus.train, _TRAINING_DOCUMENTS):
        if characters > _TRAINING_CHARACTERS:
            return
        characters += len(row["text"])
        yield row["text"]
