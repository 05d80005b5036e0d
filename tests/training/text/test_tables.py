"""Documents in tables: CSV and TSV, and what is wrong with rows, told before libraries are imported."""

import csv

import pytest

from galore_torch.training.text import sources
from galore_torch.training.text.config import DataConfig
from galore_torch.training.text.files import require_readable


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_tables_are_read_as_tables(suffix, texts, cache, tmp_path):
    file = tmp_path / f"documents.{suffix}"
    documents = [
        *(file.read_text(encoding="utf-8") for file in sorted(texts.iterdir())),
        "x" * 200_000,
    ]  # more than the standard library's reader takes by itself
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, delimiter={"csv": ",", "tsv": "\t"}[suffix])
        writer.writerows([("id", "text"), *enumerate(documents)])
    config = DataConfig(data=str(file))
    require_readable(config)
    assert sorted(row["text"] for part in sources.load(config, 0, cache) for row in part) == sorted(documents)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text,id\n", "holds no rows"),
        ("a.csv", "text,id\none, or two,1\n", "line 2 has 3 fields"),
        ("a.tsv", "words\tid\nyes\t1\n", "choose one of words, id"),
        ("a.parquet", "PAR1 cut off", "cannot be read as parquet"),
    ],
)
def test_what_is_wrong_with_rows_is_told_before_libraries_are_imported(name, content, words, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        require_readable(DataConfig(data=str(tmp_path / name)))


def test_a_table_of_a_folder_without_rows_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("text,id\none,1\ntwo,2\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("text,id\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"b\.csv' holds no rows; .* leave out"):
        require_readable(DataConfig(data=str(tmp_path)))
