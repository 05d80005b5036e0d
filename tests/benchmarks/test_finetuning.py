"""The rows that fine-tunings are compared on, and that the command they become is one that the command line takes."""

import ast
import csv
import itertools
import json

import pytest
from typer.testing import CliRunner

from benchmarks import finetuning
from tests.command_line import app


def test_docstrings_are_those_of_the_functions_and_not_in_them():
    rows = list(itertools.islice(finetuning.documented_functions(), 60))
    assert len(set(rows)) == 60
    for code, docstring in rows:
        (function,) = ast.parse(code).body
        assert ast.get_docstring(function) != docstring
        assert 40 <= len(docstring) <= 400
    assert rows == list(itertools.islice(finetuning.documented_functions(), 60))


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Keep the rows in a folder of the test's own; fetch nothing."""
    monkeypatch.setattr(finetuning, "ROWS", tmp_path)
    monkeypatch.setattr(
        finetuning,
        "rated_sentences",
        lambda: [(f"sentence {index}", "positive" if index % 2 else "negative") for index in range(520)],
    )
    monkeypatch.setattr(
        finetuning, "documented_functions", lambda: iter([(f"def f{index}(): pass", "It does.") for index in range(70)])
    )
    folder = tmp_path / "peers" / "package"
    folder.mkdir(parents=True)
    (folder / "small.gguf").touch()
    monkeypatch.setattr(finetuning, "install", lambda peer: None)
    monkeypatch.setattr(type(finetuning.SMOLLM2), "folder", tmp_path / "peers")
    return tmp_path


@pytest.mark.parametrize(("kind", "runs"), [("sentences", 9), ("docstrings", 2)])
def test_the_command_is_one_that_the_command_line_takes(kind, runs, rows):
    words = finetuning.command(kind, ["--dry-run"])
    told = CliRunner().invoke(app(), words[3:])
    assert told.exit_code == 0, told.output
    assert f"{runs} runs," in told.output


def test_no_row_is_both_trained_on_and_held_out(rows):
    finetuning.command("sentences", [])
    finetuning.command("docstrings", [])
    parts = []
    for name in ("train", "held_out"):
        with (rows / f"sentences_{name}.csv").open(encoding="utf-8") as file:
            parts.append({row["text"] for row in csv.DictReader(file)})
    assert [len(part) for part in parts] == [8, 512]
    assert not parts[0] & parts[1]
    lines = (rows / "docstrings_held_out.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 64
    assert json.loads(lines[0]).keys() == {"prompt", "completion"}
