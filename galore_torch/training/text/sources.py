"""Where documents come from: the standard library's sources, the Hugging Face Hub, or files and folders of one's own.

Whatever the source, what comes out is a `Corpus`: documents to train on and documents held out, which share none.

Datasets takes names for patterns (``g[1].csv`` for ``g1.csv``) and keeps what it has read by a file's name and time,
which the files of an unpacked archive share. Here a name is literal, and what is kept is its caller's to choose.
"""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets

from galore_torch.training.run.disk import raise_failed_write
from galore_torch.training.run.names import refused
from galore_torch.training.text.config import DataConfig
from galore_torch.training.text.files import LocalFiles, decode, local_files
from galore_torch.training.text.row_checks import missing_column
from galore_torch.units import sentence

Documents: TypeAlias = datasets.Dataset | datasets.IterableDataset
"""Rows with a column ``text``, one document each."""

# The split does not follow --seed: runs with different seeds are judged on the same documents.
_SPLIT_SEED = 0
_HELD_OUT_SHARE = 0.05
_HELD_OUT_MOST = 10_000
_SHUFFLE_BUFFER = 10_000
_CHAIN = "::"  # what Datasets reads as an address within an archive, and no escape hides


class Corpus(NamedTuple):
    """Documents to train on and documents held out, none of which is among them."""

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
    is_text = files.kind == "text"
    how = {"sample_by": _document(files.paths)} if is_text else {}
    table = read_table("data", config.data, files.kind, files.paths, files.folder(cache), **how)
    return _split(_only_text(table, "text" if is_text else config.text_column, config.data), config)


def _document(paths: list[Path]) -> str:
    """What a document of text files is: a file. Of an only file it is a paragraph, or, if that has but one, a line."""
    texts = (decode(path, path.read_bytes()) for path in paths)
    parted = ["\n\n" in text.replace("\r\n", "\n").strip() for text in texts]  # all are read: each must be UTF-8
    return "document" if len(paths) > 1 else "paragraph" if parted[0] else "line"


def read_table(field: str, name: str, kind: str, files: list[Path], cache: Path, **how: Any) -> Any:
    """Read files of rows or text.

    Args:
        field: the setting that names them.
        name: its value.
        kind: what Datasets calls theirs (text, csv, json or parquet), or tsv.
        files: their literal paths.
        cache: where Datasets keeps what it has read: a folder of these files alone.
        how: further arguments of `datasets.load_dataset`.

    Raises:
        ValueError: when they cannot be read.
        OSError: when nothing could be written.
    """
    names = [str(file.resolve()) for file in files]
    try:
        for one in names:
            if _CHAIN in one:
                raise ValueError(
                    f"{one!r} has {_CHAIN!r} in its name, which stands for a file inside an archive; rename it"
                )
        if kind == "tsv":
            kind, how = "csv", {**how, "sep": "\t"}
        return datasets.load_dataset(
            kind, data_files=[glob.escape(one) for one in names], split="train", cache_dir=str(cache), **how
        )
    except Exception as error:  # pandas, Arrow and Datasets each have their own
        raise_failed_write(error)
        why = sentence(error.__cause__ or error)
        raise ValueError(
            f"{field} = {name!r} cannot be read as {kind}, or holds no rows: {why} Fix it, or give another."
        ) from error


def _only_text(table: Any, column: str, name: str) -> Any:
    """A column alone, as ``text``, without rows that hold no text; a ValueError says that there is none."""
    if table.column_names is not None and column not in table.column_names:
        raise ValueError(f"data = {name!r}: {missing_column('text_column', column, table.column_names)}")
    table = table.select_columns([column])
    if column != "text":
        table = table.rename_column(column, "text")
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
    wrong = f"data = {config.data!r} is neither a local path nor a data set that the Hugging Face Hub gives"
    with refused(wrong, "Check the name, --subset and the network, or give stdlib or a local path."):
        parts = datasets.load_dataset(config.data, subset, streaming=True)
        if "train" not in parts:
            raise ValueError(f"it has no split named train, but {', '.join(parts)}")
        held_out = parts.get("validation", parts.get("test"))
        found = [parts["train"]] if held_out is None else [parts["train"], held_out]
        train, *held = (_only_text(part, config.text_column, config.data) for part in found)
    if not held:
        train, held = train.skip(_HELD_OUT_MOST), [train.take(_HELD_OUT_MOST)]
    return Corpus(train=train.shuffle(seed, buffer_size=_SHUFFLE_BUFFER), held_out=held[0])
