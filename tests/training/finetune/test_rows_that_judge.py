"""Rows of which nothing is learnt, or that judge what was learnt by heart: all being so is refused, some are told."""

import dataclasses

import datasets
import pytest
from rich.console import Console

from galore_torch.training.finetune.classification import find_labels
from galore_torch.training.finetune.config import RowsConfig
from galore_torch.training.finetune.data import load
from galore_torch.training.finetune.run import Finetuning
from galore_torch.training.run.run import new_run
from tests.training.finetune.conftest import sentences

ROWS = [{"text": text, "label": label} for text, label in sentences()]


def test_held_out_rows_that_are_trained_on_are_told(classify, write, tmp_path):
    held_out = write("held_out.jsonl", [ROWS[0], {**ROWS[1], "text": "another line"}, ROWS[2]])
    console = Console(record=True, width=200)
    config = classify(data=write("rows.jsonl", ROWS), held_out=held_out)
    new_run(Finetuning, config, tmp_path / "run", console=console)
    assert "2 rows are held out and trained on, too: rows 1, 3." in console.export_text()


def test_a_held_out_file_without_a_row_of_its_own(classify, tmp_path):
    for name in ("rows.parquet", "others.parquet"):  # of which nothing is read before libraries are imported
        datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / name)
    config = classify(data=str(tmp_path / "rows.parquet"), held_out=str(tmp_path / "others.parquet"))
    config.require_there()
    with pytest.raises(ValueError, match="held_out has no row that data has not"):
        new_run(Finetuning, config, tmp_path / "run")


def test_an_evaluation_on_the_rows_of_the_training_is_let_be(classify, write):
    data = write("rows.jsonl", ROWS)
    config = classify(data=data, held_out=data)
    config.require_there("evaluate")
    with pytest.raises(ValueError, match="give other rows"):
        config.require_there()


def test_rows_of_which_more_are_to_be_read_are_not_refused_for_the_first(classify, causal, write, monkeypatch):
    monkeypatch.setattr("galore_torch.training.text.rows.ROWS", 2)
    data = write("rows.jsonl", ROWS)
    classify(data=data, held_out=data).require_there()
    pair = {"prompt": "a", "chosen": "b", "rejected": "b"}
    pairs = write("pairs.jsonl", [pair, pair, {**pair, "rejected": "c"}])
    config = classify(data=data, model=str(causal))
    dataclasses.replace(config, data=dataclasses.replace(config.data, task="dpo", data=pairs)).require_there()


@pytest.mark.parametrize(
    ("labels", "held_out", "classes"),
    [
        (["007", "08", "10"], "10", ("007", "08", "10")),
        (["7", "08", "10"], "7", ("08", "10", "7")),  # of two files both are read alike
        (["7", "0", "10"], "10", (0, 7, 10)),
        (["0.5", "0", "1"], "1", None),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_values_of_tables_such_as_007_are_texts(labels, held_out, classes, suffix, tmp_path):
    sign, rows = {"csv": ",", "tsv": "\t"}[suffix], tmp_path / f"rows.{suffix}"
    table = [("text", "label", "code"), *(("02", each, "03") for each in labels)]
    rows.write_text("".join(f"{sign.join(row)}\n" for row in table))
    others = tmp_path / f"others.{suffix}"
    others.write_text(f"text{sign}label\nb{sign}{held_out}\n")
    config = RowsConfig(data=str(rows), held_out=str(others))
    found = load(config)
    assert find_labels(config, found).classes == classes
    assert found.train[0] == {"text": "02", "label": found.train[0]["label"], "code": "03"}
    numbers = dataclasses.replace(config, labels="numbers")
    assert find_labels(numbers, load(numbers)).classes is None
