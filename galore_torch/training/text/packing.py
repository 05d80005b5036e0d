"""Documents become sequences of one length: tokenized, ended by the end-of-text token, laid end to end and cut."""

from __future__ import annotations

from itertools import chain, islice
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from galore_torch.training.text.config import DataConfig
from galore_torch.training.text.sources import Corpus, Documents

_DOCUMENTS_AT_ONCE = 1000


def pack(documents: Documents, tokenizer: PreTrainedTokenizerBase, seq: int) -> Documents:
    """Turn documents, rows with a column ``text``, into rows ``input_ids`` of exactly ``seq`` tokens.

    What is left over of each thousand documents, less than one sequence, is dropped.
    """
    options = {"batched": True, "batch_size": _DOCUMENTS_AT_ONCE, "remove_columns": ["text"]}
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
    seq = config.seq
    held_out = pack(corpus.held_out, tokenizer, seq)
    wanted = config.eval_tokens // seq
    if isinstance(held_out, datasets.IterableDataset):
        held_out = datasets.Dataset.from_list(list(islice(held_out, wanted)))
    held_out = held_out.take(min(wanted, len(held_out)))
    train = pack(corpus.train, tokenizer, seq)
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
    return train, held_out


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of packed rows for a causal language model: every token is a label.

    >>> collate([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}])["labels"].tolist()
    [[1, 2], [3, 4]]
    """
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids.clone()}
