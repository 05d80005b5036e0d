"""Where documents come from: the standard library's sources, the Hugging Face Hub, or files and folders of one's own.

Whatever the source, what comes out is a `Corpus`: documents to train on and documents held out, which share none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets

from galore_torch.training.run.disk import raise_failed_write
from galore_torch.training.text.config import DataConfig
from galore_torch.training.text.files import LocalFiles, decode, local_files
from galore_torch.training.text.tables import read_table
from galore_torch.units import sentence

Documents: TypeAlias = datasets.Dataset | datasets.IterableDataset
"""Rows with a column ``text``, one document each."""

# The split does not follow --seed: runs with different seeds are judged on the same documents.
_SPLIT_SEED = 0
_HELD_OUT_SHARE = 0.05
_HELD_OUT_MOST = 10_000
_SHUFFLE_BUFFER = 10_000


class Corpus(NamedTuple):
    """Documents to train on, endless if they are streamed, and documents held out, none of which is among them."""

    train: Documents
    held_out: Documents

    @property
    def streamed(self) -> bool:
        """Whether documents arrive one after the other, without a known number."""
        return isinstance(self.train, datasets.IterableDataset)


def load(config: DataConfig, seed: int, cache: Path, files: LocalFiles | None = None) -> Corpus:
    """Find the documents that ``config.data`` names and hold some out.

    A stream is shuffled by the seed; of files, those that `local_files` has found if it was asked before, Arrow tables
    are kept in the cache. A ValueError says that nothing is there, cannot be read, or holds too little text.
    """
    files = files or local_files(config)
    if files is None:
        return _stream(config, seed)
    read = _text if files.kind == "text" else _table
    return _split(read(files, config, files.folder(cache)), config)


def _text(files: LocalFiles, _config: DataConfig, folder: Path) -> datasets.Dataset:
    # The digest is in the key under which the table is cached: an edited file is read anew. Datasets would take a list
    # for shards and call `_read` once for each.
    given = {"names": tuple(map(str, files.paths)), "digest": files.digest}
    try:
        return datasets.Dataset.from_generator(_read, gen_kwargs=given, cache_dir=str(folder), split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        raise_failed_write(error)
        raise ValueError(f"{error.__cause__ or error}") from error


def _read(names: tuple[str, ...], digest: str) -> Iterator[dict[str, str]]:  # noqa: ARG001
    """Documents of text files: a file is one. Of an only file its paragraphs are, or, if it has but one, its lines."""
    for name in names:
        text = decode(Path(name), Path(name).read_bytes()).replace("\r\n", "\n")
        documents = [text]
        if len(names) == 1:
            documents = text.split("\n\n") if "\n\n" in text.strip() else text.splitlines()
        for document in documents:
            if document.strip():
                yield {"text": document}


def _table(files: LocalFiles, config: DataConfig, folder: Path) -> datasets.Dataset:
    try:
        table = read_table(files.kind, files.paths, folder)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        raise_failed_write(error)
        raise ValueError(
            f"data = {config.data!r} cannot be read as {files.kind}: {sentence(error.__cause__ or error)} "
            f"Give valid {files.kind} files."
        ) from error
    return _only_text(table, config)


def _only_text(table: Any, config: DataConfig) -> Any:
    """The text column alone, as ``text``, without rows that hold no text."""
    columns = table.column_names
    if columns is not None and config.text_column not in columns:
        raise ValueError(
            f"text_column = {config.text_column!r} is not a column of data = {config.data!r}; "
            f"choose one of {', '.join(columns)}."
        )
    table = table.select_columns([config.text_column])
    if config.text_column != "text":
        table = table.rename_column(config.text_column, "text")
    return table.filter(lambda row: isinstance(row["text"], str) and bool(row["text"].strip()))


def _split(documents: datasets.Dataset, config: DataConfig) -> Corpus:
    count = len(documents)
    if count < 2:
        raise ValueError(
            f"data = {config.data!r} holds {count} documents; give at least two, of which one is held out: "
            "paragraphs or lines of one file, or several files."
        )
    held_out = min(max(1, round(count * _HELD_OUT_SHARE)), _HELD_OUT_MOST)
    parts = documents.train_test_split(test_size=held_out, seed=_SPLIT_SEED)
    return Corpus(train=parts["train"], held_out=parts["test"])


def _stream(config: DataConfig, seed: int) -> Corpus:
    """The documents of a data set of the Hub, as they arrive."""
    subset = "en" if config.subset is None and config.data == "allenai/c4" else config.subset
    try:
        splits = datasets.load_dataset(config.data, subset, streaming=True)
        if "train" not in splits:
            raise ValueError(f"it has no split named train, but {', '.join(splits)}")
        train, held_out = splits["train"], splits.get("validation", splits.get("test"))
        columns = _only_text(train, config)
    except Exception as error:  # the Hub's client raises errors of many kinds: missing, gated, offline, no such subset
        raise ValueError(
            f"data = {config.data!r} is neither a local path nor a data set that the Hugging Face Hub gives: "
            f"{sentence(error)} Check the name, --subset and the network, or give stdlib or a local path."
        ) from error
    if held_out is None:
        train, held_out = columns.skip(_HELD_OUT_MOST), columns.take(_HELD_OUT_MOST)
    else:
        train, held_out = columns, _only_text(held_out, config)
    return Corpus(train=train.shuffle(seed, buffer_size=_SHUFFLE_BUFFER).repeat(None), held_out=held_out)
