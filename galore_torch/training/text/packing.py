"""From the name of some text to sequences of one length.

Documents are tokenized, by a byte-level BPE that is trained on the spot or by a ready tokenizer, ended by the
end-of-text token, laid end to end and cut.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from galore_torch.training.run.files import kept
from galore_torch.training.run.names import local_path, refused
from galore_torch.training.run.stream import Stream
from galore_torch.training.text import sources
from galore_torch.training.text.config import DataConfig
from galore_torch.training.text.files import LocalFiles, local_files
from galore_torch.training.text.sources import Corpus, Documents
from galore_torch.units import first_of

END_OF_TEXT = "<|endoftext|>"
"""Ends every document; the one special token of a tokenizer trained here."""

_PAPER_TOKENIZER = "t5-base"
_TRAINING_DOCUMENTS = 20_000
_TRAINING_CHARACTERS = 32 * 2**20
_AT_ONCE = 1000  # documents or sequences


@dataclass(frozen=True, kw_only=True)
class Text:
    """Packed sequences to train on and for the evaluation, and the tokenizer that cut them."""

    train: datasets.Dataset | Stream
    held_out: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase

    @property
    def digest(self) -> str:
        """A digest of every token that is trained or judged on, but for a stream's, and of the tokenizer's entries."""
        digest = hashlib.sha256(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())
        for part in (self.train, self.held_out):
            if isinstance(part, datasets.Dataset):
                digest.update(f"{len(part)} sequences".encode())
                for rows in part.with_format("numpy").iter(_AT_ONCE):
                    digest.update(rows["input_ids"].astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def stream(self) -> Stream | None:
        """What it is trained on, if that is a stream, which tells its digest as it is read."""
        return self.train if isinstance(self.train, Stream) else None

    @property
    def tokens(self) -> int | None:
        """How many there are to train on; a stream does not tell."""
        return None if isinstance(self.train, Stream) else len(self.train) * len(self.train[0]["input_ids"])

    @property
    def amount(self) -> str:
        """How much there is to train on, for people."""
        return "streamed" if self.tokens is None else f"{self.tokens:,} tokens"


def prepare_text(
    config: DataConfig, console: Console, *, batch: int, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> Text:
    """Read, tokenize and pack the text, or find it in the cache; a ValueError says why that cannot be.

    What fills no whole batch, of so many sequences a step, is left out; the seed is that of a stream's order. A
    tokenizer that is given is a model's own, in the place of the settings'.
    """
    with console.status("Reading the text") as status, corpus_of(config, seed) as (corpus, files):
        if files is not None:
            console.out(_told(config, files, corpus), highlight=False)
        status.update("Preparing the tokenizer")
        tokenizer = tokenizer or tokenizer_for(corpus, config, cache_folder(config))
        if tokenizer.eos_token_id is None:
            name = tokenizer.name_or_path
            raise ValueError(f"tokenizer = {name!r} has no end-of-text token to end documents with; choose another.")
        status.update("Packing documents into sequences")
        train, held_out = sequences(corpus, tokenizer, config, batch)
    if corpus.streamed:
        train = Stream(train, batch=batch, data=config.data, endless=True)
    return Text(train=train, held_out=held_out, tokenizer=tokenizer)


@contextmanager
def corpus_of(config: DataConfig, seed: int) -> Iterator[tuple[Corpus, LocalFiles | None]]:
    """The documents, and the files that they are in if those are here, whose tables no other process touches meanwhile.

    The seed is that of a stream's order; a ValueError says why there are none.
    """
    cache, files = cache_folder(config), local_files(config)
    with nullcontext() if files is None else kept(files.folder(cache)):
        yield sources.load(config, seed, cache, files), files


def _told(config: DataConfig, files: LocalFiles, corpus: Corpus) -> str:
    """What was read and what was not."""
    read, held_out = map(len, corpus)
    names = [path.name for path in files.left_out]
    left = f"; left out, as empty or no text: {first_of(names)}" if names else ""
    return f"{config.data}: files {len(files.paths):,}, documents {read + held_out:,}, held out {held_out:,}{left}"


def cache_folder(config: DataConfig) -> Path:
    """Where tokenizers and tokenized text are kept: the setting, $GALORE_CACHE, or ``~/.cache/galore-torch``."""
    return local_path("cache", config.cache or os.environ.get("GALORE_CACHE") or "~/.cache/galore-torch")


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
    with refused(f"tokenizer = {name!r} cannot be loaded", "Check the name and the network, or give train."):
        return AutoTokenizer.from_pretrained(name)


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


def pack(documents: Documents, tokenizer: PreTrainedTokenizerBase, seq: int) -> Documents:
    """Turn documents, rows with a column ``text``, into rows ``input_ids`` of exactly ``seq`` tokens.

    What is left over of each thousand documents, less than one sequence, is dropped. Datasets knows what it has packed
    by all that a tokenizer holds, and a run's model has that of its text under another name.
    """
    tokenizer = copy.copy(tokenizer)
    tokenizer.name_or_path, tokenizer.model_max_length, tokenizer.init_kwargs = "", 0, {}  # none of which cuts text
    options = {"batched": True, "batch_size": _AT_ONCE, "remove_columns": ["text"]}
    named = {"desc": "Tokenizing"} if isinstance(documents, datasets.Dataset) else {}
    return documents.map(_tokenize_and_cut, fn_kwargs={"tokenizer": tokenizer, "seq": seq}, **options, **named)


def _tokenize_and_cut(batch: dict[str, list[str]], *, tokenizer: PreTrainedTokenizerBase, seq: int) -> dict[str, Any]:
    cut = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    tokens = list(chain.from_iterable([*document, tokenizer.eos_token_id] for document in cut))
    return {"input_ids": [tokens[start : start + seq] for start in range(0, len(tokens) - seq + 1, seq)]}


def sequences(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, config: DataConfig, batch: int
) -> tuple[Documents, datasets.Dataset]:
    """Packed sequences to train on, in whole batches of so many a step, and those for the evaluation.

    Raises:
        ValueError: when the text does not fill one batch, or the held-out text one sequence.
    """
    seq, wanted = config.seq, config.eval_tokens // config.seq
    train, held_out = (pack(part, tokenizer, seq) for part in corpus)
    if isinstance(held_out, datasets.IterableDataset):
        held_out = datasets.Dataset.from_list(list(islice(held_out, wanted)))
    if isinstance(train, datasets.Dataset):
        if len(train) < batch:
            raise ValueError(
                f"data = {config.data!r} fills {len(train)} sequences of {seq} tokens, less than "
                f"one batch of {batch}; give more text, or a smaller --batch or --seq."
            )
        train = train.take(len(train) // batch * batch)  # so that every step sees as many tokens
    if not len(held_out):
        raise ValueError(
            f"data = {config.data!r} holds out less than one sequence of {seq} tokens; "
            "give more text or a smaller --seq."
        )
    return train, held_out.take(min(wanted, len(held_out)))


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of packed rows for a causal language model: every token is a label.

    >>> collate([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}])["labels"].tolist()
    [[1, 2], [3, 4]]
    """
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids.clone()}
