"""From the name of some text to packed sequences: `sources`, `tokenizer` and `packing`, one after the other."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import datasets
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from galore_torch.training.run.names import local_path
from galore_torch.training.run.stream import Stream
from galore_torch.training.text import packing, sources
from galore_torch.training.text.caches import kept
from galore_torch.training.text.config import DataConfig
from galore_torch.training.text.files import LocalFiles, local_files
from galore_torch.training.text.tokenizer import tokenizer_for

_ROWS_AT_ONCE = 1000


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
                for rows in part.with_format("numpy").iter(_ROWS_AT_ONCE):
                    digest.update(rows["input_ids"].astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def stream(self) -> Stream | None:
        """What it is trained on, if that is a stream, which tells its digest as it is read."""
        return self.train if isinstance(self.train, Stream) else None


def prepare_text(
    config: DataConfig, console: Console, *, batch: int, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> Text:
    """Read, tokenize and pack the text, or find it in the cache; a ValueError says why that cannot be.

    What fills no whole batch, of so many sequences a step, is left out; the seed is that of a stream's order. A
    tokenizer that is given is a model's own, in the place of the settings'.
    """
    cache = cache_folder(config)
    with console.status("Reading the text"):
        files = local_files(config)
    with nullcontext() if files is None else kept(files.folder(cache)):
        with console.status("Reading the text"):
            corpus = sources.load(config, seed, cache, files)
        if files is not None:
            console.out(_told(config, files, corpus), highlight=False)
        with console.status("Preparing the tokenizer"):
            tokenizer = tokenizer or tokenizer_for(corpus, config, cache)
        if tokenizer.eos_token_id is None:
            name = tokenizer.name_or_path
            raise ValueError(f"tokenizer = {name!r} has no end-of-text token to end documents with; choose another.")
        with console.status("Packing documents into sequences"):
            train, held_out = packing.sequences(corpus, tokenizer, config, batch)
    if corpus.streamed:
        train = Stream(train, batch=batch, data=config.data)
    return Text(train=train, held_out=held_out, tokenizer=tokenizer)


def _told(config: DataConfig, files: LocalFiles, corpus: sources.Corpus) -> str:
    """What was read and what was not."""
    read, held_out = (len(part) for part in (corpus.train, corpus.held_out))
    names = [path.name for path in files.left_out]
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    left = f"; left out, as empty or no text: {', '.join(names[:3])}{more}" if names else ""
    return f"{config.data}: files {len(files.paths):,}, documents {read + held_out:,}, held out {held_out:,}{left}"


def cache_folder(config: DataConfig) -> Path:
    """Where tokenizers and tokenized text are kept: the setting, $GALORE_CACHE, or ``~/.cache/galore-torch``."""
    named = config.cache or os.environ.get("GALORE_CACHE") or "~/.cache/galore-torch"
    return local_path("cache", named)


def amount(text: Text, config: DataConfig) -> str:
    """How much there is to train on, for people."""
    if isinstance(text.train, Stream):
        return "streamed"
    return f"{len(text.train) * config.seq:,} tokens"
