"""Documents from every source, disjoint splits and tokenizers."""

import json
import os
from itertools import islice
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from galore_torch.training.pretrain.model import entries
from galore_torch.training.text import files as files_of_text
from galore_torch.training.text import sources
from galore_torch.training.text.config import DataConfig
from galore_torch.training.text.packing import prepare_text, tokenizer_for


def rows(texts: Path) -> list[str]:
    return [file.read_text(encoding="utf-8") for file in sorted(texts.iterdir())]


def written(kind: str, documents: list[str], folder: Path, column: str = "text") -> Path:
    """Documents as one file of a kind, beside another column."""
    if kind == "parquet":
        file = folder / "documents.parquet"
        pyarrow.parquet.write_table(pyarrow.table({column: documents, "id": list(range(len(documents)))}), file)
    else:
        file = folder / "documents.jsonl"
        lines = (json.dumps({column: text, "id": index}) for index, text in enumerate(documents))
        file.write_text("\n".join(lines), encoding="utf-8")
    return file


def all_texts(corpus: sources.Corpus) -> list[str]:
    return [row["text"] for row in corpus.train] + [row["text"] for row in corpus.held_out]


@pytest.mark.parametrize("kind", ["folder", "json", "parquet", "folder of parquet"])
def test_every_local_source_gives_the_same_documents_and_holds_some_out(kind, texts, cache, tmp_path):
    path = texts if kind == "folder" else written(kind.split()[-1], rows(texts), tmp_path)
    corpus = sources.load(DataConfig(data=str(path.parent if kind == "folder of parquet" else path)), 0, cache)
    assert sorted(all_texts(corpus)) == sorted(rows(texts))
    assert len(corpus.held_out) == 1
    assert corpus.train.column_names == ["text"]


def test_one_text_file_is_split_into_paragraphs(cache, tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(f"paragraph {index}" for index in range(40)), encoding="utf-8")
    corpus = sources.load(DataConfig(data=str(file)), 0, cache)
    assert (len(corpus.train), len(corpus.held_out)) == (38, 2)


def test_an_edited_file_is_read_anew(cache, tmp_path):
    file = tmp_path / "book.txt"
    for word in ("before", "after it was edited"):
        file.write_text(f"one\n\n{word}", encoding="utf-8")
        assert word in all_texts(sources.load(DataConfig(data=str(file)), 0, cache))


@pytest.mark.parametrize("kind", ["json", "parquet", "text"])
def test_new_rows_under_an_old_name_and_time_are_read(kind, cache, tmp_path):
    for word in ("before", "after!"):  # of one length, as an unpacked archive may have it
        if kind == "text":
            file = tmp_path / "book.txt"
            file.write_text(f"one\n\n{word}", encoding="utf-8")
        else:
            file = written(kind, ["one", word], tmp_path)
        os.utime(file, (1e9, 1e9))
        assert word in all_texts(sources.load(DataConfig(data=str(file)), 0, cache))


@pytest.mark.parametrize("folder", [".", "a[1]*", "~nobody-has-this-home"])
@pytest.mark.parametrize(
    "name",
    ["g[1].jsonl", "g*.jsonl", "g?.jsonl", "[!g].jsonl", "{a,b}.jsonl", "a#b%41.jsonl", "~g.jsonl", " g\n.jsonl"],
)
@pytest.mark.broad
def test_a_name_is_no_pattern(name, folder, cache, tmp_path, monkeypatch):
    (tmp_path / folder).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for other, word in (("g1.jsonl", "wrong"), ("gg.jsonl", "wrong"), ("a.jsonl", "wrong"), (name, "right")):
        lines = [json.dumps({"text": f"{word} {number}"}) for number in range(3)]
        (Path(folder) / other).write_text("\n".join(lines), encoding="utf-8")
    found = all_texts(sources.load(DataConfig(data=f"{folder}/{name}"), 0, cache))
    assert sorted(found) == ["right 0", "right 1", "right 2"]


def test_a_name_that_datasets_would_take_apart_is_refused(cache, tmp_path):
    file = tmp_path / "a::b.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"'::' in it.*rename it"):
        sources.load(DataConfig(data=str(file)), 0, cache)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_name_that_no_file_can_have_is_told(name, cache):
    with pytest.raises(ValueError, match="data"):
        sources.load(DataConfig(data=name), 0, cache)


def passages(count: int = 30) -> list[str]:
    return [f"Passage {number} is as short as that, and no other is quite like it." for number in range(count)]


def prepared(config):
    schedule = config.schedule
    return prepare_text(config.data, Console(quiet=True), batch=schedule.batch, seed=schedule.seed)


@pytest.fixture
def small(tiny, tmp_path):
    """Make the configuration of a run on a few passages, by a tokenizer that no text changes."""

    def make(documents, **given):
        data = written("json", documents, tmp_path)
        return tiny(**{"data": str(data), "cache": str(tmp_path / "cache"), "tokenizer": ready(tmp_path), **given})

    return make


@pytest.mark.parametrize("place", [0, 7, 13, 29])
@pytest.mark.broad("13")
def test_the_digest_is_of_every_token(place, small):
    digests = set()
    for word in ("short", "brief"):  # of one length: no other token moves
        documents = passages()
        documents[place] = documents[place].replace("short", word)
        digests.add(prepared(small(documents)).digest)
    assert len(digests) == 2


def ready(folder: Path) -> str:
    """A tokenizer of bytes, which no text changes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(["</s>", *alphabet])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(folder / "bytes")
    return str(folder / "bytes")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "flipped": flipped,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.broad("removed")
def test_a_damaged_cache_is_made_again(damage, small, tmp_path):
    config = small(passages(), tokenizer="train", vocab=300)
    digest = prepared(config).digest
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert {path.suffix for path in files} == {".arrow", ".json"}
    for file in files:
        if file.stat().st_size:
            DAMAGE[damage](file)
            assert prepared(config).digest == digest, file


def test_a_cache_is_not_filled_by_what_failed(small, tmp_path):
    with pytest.raises(ValueError, match="fills"):
        prepared(small(passages(), batch=100_000, micro_batch=4))
    made = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert made == []


def test_another_column_can_hold_the_text(texts, cache, tmp_path):
    path = written("json", rows(texts), tmp_path, column="content")
    corpus = sources.load(DataConfig(data=str(path), text_column="content"), 0, cache)
    assert sorted(all_texts(corpus)) == sorted(rows(texts))


def test_the_standard_library_is_read_without_tests_in_a_fixed_order():
    files = files_of_text._standard_library()
    parts = {part for file in files for part in file.parts[-4:]}
    assert not parts & {"test", "tests", "site-packages", "idle_test"}
    assert files == sorted(files)
    assert {"argparse.py", "typing.py"} <= parts
    assert sum(file.stat().st_size for file in files) > 5_000_000


def hub(monkeypatch: pytest.MonkeyPatch, folder: Path, splits: dict[str, list[str]]) -> list[tuple]:
    """Let a Hub data set be local files, streamed; what was asked for is returned."""
    files = {}
    for split, documents in splits.items():
        (folder / split).mkdir()
        files[split] = str(written("json", documents, folder / split))
    asked, load = [], datasets.load_dataset

    def load_dataset(name, subset, *, streaming):
        asked.append((name, subset, streaming))
        return load("json", data_files=files, streaming=True, cache_dir=str(folder / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_data_set_is_streamed_without_end_and_its_validation_is_held_out(monkeypatch, texts, cache, tmp_path):
    documents = rows(texts)
    asked = hub(monkeypatch, tmp_path, {"train": documents[2:], "validation": documents[:2]})
    corpus = sources.load(DataConfig(data="allenai/c4"), 0, cache)
    assert asked == [("allenai/c4", "en", True)]
    assert corpus.streamed
    assert [row["text"] for row in corpus.held_out] == documents[:2]
    assert sorted(row["text"] for row in corpus.train) == sorted(documents[2:])
    config = DataConfig(data="allenai/c4", tokenizer="train", vocab=300, seq=64, eval_tokens=128, cache=str(cache))
    stream = prepare_text(config, Console(quiet=True), batch=4, seed=0).stream
    once = list(stream._rows)
    assert len(once) > 20
    assert list(islice(stream, 2 * len(once) + 3)) == [*once, *once, *once[:3]]


def test_a_stream_without_validation_holds_its_first_documents_out(monkeypatch, texts, cache, tmp_path):
    documents = rows(texts)
    monkeypatch.setattr(sources, "_HELD_OUT_MOST", 3)
    hub(monkeypatch, tmp_path, {"train": documents})
    corpus = sources.load(DataConfig(data="someone/texts"), 0, cache)
    assert [row["text"] for row in corpus.held_out] == documents[:3]
    assert not {row["text"] for row in islice(corpus.train, 100)} & set(documents[:3])


def test_a_data_set_that_the_hub_does_not_give_is_told(monkeypatch, cache):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"data = 'someone/texts' .*no route.*--subset"):
        sources.load(DataConfig(data="someone/texts"), 0, cache)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, ["does not exist"]),
        ({}, ["holds no text, CSV, JSON lines or Parquet file"]),
        ({"a.txt": b"", "b.txt": b""}, ["is empty", "give a file or folder"]),
        ({"a.txt": b"one\n\ntwo", "b.jsonl": b"{}"}, ["files of one kind"]),
        ({"a.txt": b"fine", "b.txt": b"\xff\xfe\x00broken"}, ["b.txt", "UTF-8"]),
        ({"a.jsonl": b'{"text": "one"'}, ["cannot be read as json"]),
        ({"a.jsonl": b'{"content": "one"}\n{"content": "two"}'}, ["text_column = 'text'", "choose one of content"]),
        ({"a.txt": b"only one paragraph"}, ["holds 1 documents", "at least two"]),
        ({"a.parquet": b"nothing of the kind"}, ["cannot be read as parquet"]),
        ({"a.tsv": b"words\tid\nyes\t1\n"}, ["text_column = 'text'", "choose one of words, id"]),
    ],
)
def test_data_that_cannot_be_used_is_told_with_the_remedy(files, words, cache, tmp_path):
    folder = tmp_path / "data.txt"  # a name that can be no Hub data set
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="data") as caught:
        sources.load(DataConfig(data=str(folder)), 0, cache)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_hidden_copies_in_a_folder_are_left_out(tmp_path):
    for name in ("one.txt", "two.txt", ".ipynb_checkpoints/one-checkpoint.txt", ".git/three.txt", "._two.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text", encoding="utf-8")
    found = files_of_text.local_files(DataConfig(data=str(tmp_path)))
    assert [path.name for path in found.paths] == ["one.txt", "two.txt"]
    assert len(found.left_out) == 3


def test_a_pipe_is_refused_as_what_it_is():
    ends = os.pipe()
    try:
        with pytest.raises(ValueError, match="is a pipe or a device; give an existing file"):
            files_of_text.local_files(DataConfig(data=f"/dev/fd/{ends[0]}"))
    finally:
        for end in ends:
            os.close(end)


def test_a_file_that_may_not_be_read_is_told(monkeypatch, cache, tmp_path):
    file = tmp_path / "secret.txt"
    file.write_text("one\n\ntwo", encoding="utf-8")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    with pytest.raises(ValueError, match=r"secret\.txt cannot be read"):
        sources.load(DataConfig(data=str(file)), 0, cache)


def test_a_trained_tokenizer_is_cached_exact_and_loads_by_itself(texts, tmp_path):
    config = DataConfig(data=str(texts), vocab=400)
    corpus = sources.load(config, 0, tmp_path)
    tokenizer = tokenizer_for(corpus, config, tmp_path)
    (folder,) = (path for path in (tmp_path / "tokenizers").iterdir() if path.is_dir())
    made = folder.stat().st_mtime_ns
    again = tokenizer_for(corpus, config, tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert folder.stat().st_mtime_ns == made
    text = "def naïve(x):\n\treturn  x  # 日本\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert len(tokenizer) == entries(tokenizer) == 400


def test_embeddings_are_counted_without_sentinels(tmp_path):
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=[f"<extra_id_{index}>" for index in range(10)],
    )
    assert len(tokenizer) == 15
    assert entries(tokenizer) == 5


def test_a_tokenizer_that_cannot_be_loaded_is_told(texts, cache, tmp_path):
    config = DataConfig(data=str(texts), tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"tokenizer = .*nowhere.* or give train"):
        tokenizer_for(sources.load(config, 0, cache), config, cache)
