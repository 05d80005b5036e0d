"""A fine-tuning in several processes, which torchrun starts: the one of one process, also where a process is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from galore_torch.training.run import processes, records
from galore_torch.training.run.folder import RunFolder
from tests.training.run.test_processes import BAR, ended

STEPS = 5  # all of whole batches: one that is cut short at the end of an epoch is filled up for the other process


@pytest.fixture
def settings(classify, supervise, encoder, causal, write, tmp_path):
    """Write the settings of a task's run to a file and return its path: at a rate that does not enlarge rounding.

    The encoder is without dropout, which differs from process to process.
    """
    pair = {"chosen": "heapq", "rejected": "calendar"}
    pairs = write("pairs.jsonl", [{"prompt": f"row {number}\n", **pair} for number in range(64)])
    plain = shutil.copytree(encoder, tmp_path / "encoder")
    path = plain / "config.json"
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | without))

    def made(task: str) -> str:
        own: dict[str, Any] = {"steps": STEPS, "batch": 8, "save_every": 3, "eval_every": 3, "lr": 1e-4}
        if task == "classify":
            config = classify(model=str(plain), **own)
        elif task == "reward":
            config = supervise(task=task, data=pairs, answers=None, answer_tokens=None, **own)
        else:
            config = supervise(**own)
        path = tmp_path / "config.toml"
        path.write_text(config.to_toml(), encoding="utf-8")
        return str(path)

    return made


def figures(folder: Path) -> list[dict[str, Any]]:
    """What a run recorded that has nothing to do with time, memory and its own folder."""
    names = ("loss", "eval_loss", "accuracy", "perplexity", "margin", "step", "examples")
    return [
        {name: value for name, value in record.items() if name in names}
        for record in records.read(RunFolder(folder).metrics)
    ]


def answers(folder: Path) -> list[Any]:
    lines = RunFolder(folder).predictions.read_text(encoding="utf-8").splitlines()
    return [(line["row"], line.get("prediction")) for line in map(json.loads, lines)]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "sft", "reward"])
def test_two_processes_make_the_fine_tuning_of_one_also_where_one_is_killed(task, settings, tmp_path):
    given = "--config", settings(task)
    ended(tmp_path / "alone", *given, job="finetune", world=1)
    ended(tmp_path / "two", *given, job="finetune")
    ended(tmp_path / "lost", *given, job="finetune", restarts=1, loses="1:4")
    alone = figures(tmp_path / "alone")
    assert alone[-1]["step"] == STEPS
    for name in ("two", "lost"):
        found = figures(tmp_path / name)
        assert [record.keys() for record in found] == [record.keys() for record in alone]
        for record, like in zip(found, alone, strict=True):
            # TRL's evaluations average over batches, which are of another size.
            bar = BAR if "loss" in record or task == "classify" else 0.02
            assert record == pytest.approx(like, rel=bar, abs=BAR)
        assert answers(tmp_path / name) == answers(tmp_path / "alone")


@pytest.mark.parametrize("task", ["dpo", "grpo"])
def test_stages_that_run_in_one_process_are_refused_in_more(task, supervise, monkeypatch):
    config = supervise(task=task)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE = 2"):
        processes.require_served(config)
