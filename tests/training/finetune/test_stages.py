"""The stages after supervised fine-tuning, on TRL's trainers: they learn, resume exactly and leave their judgements."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from galore_torch.training.finetune.on_trl import rewards
from galore_torch.training.finetune.presets import configure
from galore_torch.training.finetune.run import Finetuning
from galore_torch.training.run import records
from galore_torch.training.run.run import new_run, resumed_run
from tests.training.during import During, ctrl_c
from tests.training.finetune.conftest import losses, sentences


@pytest.fixture
def pairs(write) -> str:
    """JSON lines of prompts with two answers, one always preferred, and with what an answer is to end by."""
    pair = {"chosen": "heapq", "rejected": "calendar", "answer": "e"}
    return write("pairs.jsonl", [{"prompt": text + "\n", **pair} for text, _ in sentences()[:48]])


@pytest.fixture
def staged(causal, pairs):
    """Make the configuration of a short stage, any setting overridden."""

    def make(task, **given):
        settings = {"model": str(causal), "max_length": 64, "steps": 8, "batch": 8, "lr": 3e-3, "rank": 8}
        settings |= {"data": pairs} | ({"generations": 8, "batch": 16, "steps": 4} if task == "grpo" else {})
        if task != "reward":
            settings |= {"answers": 2, "answer_tokens": 4}
        return configure(task=task, **{**settings, **given})

    return make


def said(out) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("task", ["dpo", "reward", "grpo"])
@pytest.mark.broad("grpo")
def test_a_stage_is_trained_saved_and_resumed_exactly(task, staged, tmp_path):
    for name, stop in (("whole", []), ("parts", [During(2, ctrl_c)])):
        new_run(Finetuning, staged(task), tmp_path / name, callbacks=stop).train()
    result = resumed_run(Finetuning, tmp_path / "parts").train()
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    kept = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert said(tmp_path / "whole") == said(tmp_path / "parts")
    final = records.final(tmp_path / "whole" / "metrics.jsonl")
    assert final["task"] == task
    assert final["scores"] == result.scores
    assert result.renewals > 0
    kind = AutoModelForSequenceClassification if task == "reward" else AutoModelForCausalLM
    assert kind.from_pretrained(tmp_path / "whole" / "model").num_parameters() == result.parameters


@pytest.mark.learning
@pytest.mark.parametrize(
    ("task", "method"),
    [
        ("dpo", "galore"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("reward", "galore"), ("dpo", "lora"))),
    ],
)
def test_of_two_answers_the_preferred_one_is_learnt(task, method, staged, tmp_path):
    given = {"method": method, "lr": 1e-2, "steps": 24, **({"answers": 0} if task == "dpo" else {})}
    result = new_run(Finetuning, staged(task, **given), tmp_path / "run").train()
    assert result.scores["accuracy"] == 1.0  # of five held-out rows
    assert result.scores["margin"] > 0


def test_sums_are_made_on_the_spot(staged, tmp_path):
    run = new_run(Finetuning, staged("grpo", data="arithmetic", steps=1), tmp_path / "run")
    row = run.job.kind.train[0]
    assert eval(row["prompt"].removesuffix("= ")) == int(row["answer"])
    assert len(run.job.kind.train) + len(run.job.kind.held_out) == 2000


@pytest.mark.parametrize("task", ["dpo", "reward"])
def test_pairs_of_equal_answers_are_told(task, staged, pairs, write, tmp_path):
    rows = [json.loads(line) for line in Path(pairs).read_text(encoding="utf-8").splitlines()]
    for number in (3, 7):
        rows[number - 1]["rejected"] = rows[number - 1]["chosen"]
    console = Console(record=True, width=200)
    new_run(Finetuning, staged(task, data=write("some.jsonl", rows)), tmp_path / task, console=console)
    assert "2 rows are pairs of equal answers, of which nothing is learnt: rows 3, 7." in console.export_text()


def test_predictions_name_the_row_and_what_was_expected(staged, pairs, tmp_path):
    new_run(Finetuning, staged("reward", steps=1), tmp_path / "reward").train()
    new_run(Finetuning, staged("dpo", steps=1), tmp_path / "dpo").train()
    rows = [json.loads(line) for line in Path(pairs).read_text(encoding="utf-8").splitlines()]
    told = {task: said(tmp_path / task) for task in ("reward", "dpo")}
    assert [len({found["row"] for found in each}) for each in told.values()] == [5, 2]  # two are answered
    for found in told["reward"]:
        row = rows[found["row"] - 1]
        assert (found["prompt"], found["chosen"]) == (row["prompt"], row["chosen"])
        assert {"reward_chosen", "reward_rejected"} < found.keys()
    for found in told["dpo"]:
        row = rows[found["row"] - 1]
        assert (found["input"], found["expected"]) == (row["prompt"], row["chosen"])


@pytest.mark.usefixtures("planned")
@pytest.mark.parametrize("task", ["dpo", "reward", "grpo"])
@pytest.mark.broad("dpo")
def test_a_stage_is_made_ready_where_its_memory_is_to_be_planned(task, staged, tmp_path):
    assert new_run(Finetuning, staged(task), tmp_path / "run").checkpoint is None


def test_a_rule_rewards_the_last_number():
    assert rewards(["3 or 4", "it is 4.0", "-4", ""], answer=["4"] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert rewards([[{"role": "assistant", "content": "Paris"}]], answer=["paris"]) == [1.0]


# Rows as people have them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (
            {"instruction": "Add.", "input": "1 and 2", "output": "3"},
            {"prompt": "Add.\n\n1 and 2\n\n", "completion": "3"},
        ),
        ({"instruction": "Greet.", "input": "", "output": "Hi"}, {"prompt": "Greet.\n\n", "completion": "Hi"}),
        ({"instruction": "Count.", "input": 0, "output": 0}, {"prompt": "Count.\n\n0\n\n", "completion": "0"}),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        ),
    ],
)
def test_rows_of_other_forms_are_taken(row, columns, write, supervise, tmp_path):
    data = write("rows.jsonl", [row] * 12)
    run = new_run(Finetuning, supervise(data=data, batch=4, steps=1), tmp_path / "run")
    assert run.job.kind.train[0] == columns


@pytest.mark.parametrize("given", [{"packing": True}, {"bf16": True}, {"gradient_checkpointing": True}])
@pytest.mark.broad("given1")
def test_what_saves_time_or_memory_trains(given, supervise, tmp_path):
    run = new_run(Finetuning, supervise(steps=2, answers=0, **given), tmp_path / "run")
    args = run.trainer.args
    assert (args.packing, args.bf16) == tuple(name in given for name in ("packing", "bf16"))
    assert run.model.model.layers[0].gradient_checkpointing is ("gradient_checkpointing" in given)
    assert run.train().finished
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("sft", {"prompt": "2 + 2 = ", "completion": 4}),
        ("dpo", {"prompt": "2 + 2 = ", "chosen": 4, "rejected": 5}),
        ("grpo", {"prompt": "2 + 2 = ", "answer": 4}),
    ],
)
def test_numbers_are_taken_for_text(task, row, write, causal, tmp_path):
    config = configure(task=task, model=str(causal), data=write("sums.csv", [row] * 8), max_length=32, steps=1)
    run = new_run(Finetuning, config, tmp_path / "run")
    assert run.job.kind.train[0] == {name: str(value) for name, value in row.items()}


@pytest.mark.parametrize("task", ["sft", "dpo", "reward"])
def test_rows_that_are_left_out_for_their_length_are_told(task, write, causal, tmp_path):
    answers = {"completion": "a"} if task == "sft" else {"chosen": "a", "rejected": "b"}
    rows = [{"prompt": "word " * (99 if number % 2 else 1), **answers} for number in range(8)]
    given = {"task": task, "model": str(causal), "max_length": 32, "steps": 1, "batch": 2}
    console = Console(record=True, width=200)
    new_run(Finetuning, configure(data=write("rows.jsonl", rows), **given), tmp_path / "run", console=console)
    assert "4 rows are too long for max_length = 32, and left out." in console.export_text()
    none = configure(data=write("none.jsonl", rows[1::2]), **given)
    with pytest.raises(ValueError, match="max_length = 32 leaves no answers"):
        new_run(Finetuning, none, tmp_path / "none")


def test_a_chat_template_can_be_given(write, supervise, causal, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{% for message in messages %}[{{ message['content'] }}]{% endfor %}", encoding="utf-8")
    data = write(
        "chats.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 8
    )
    run = new_run(Finetuning, supervise(data=data, batch=4, steps=1, chat_template=str(file)), tmp_path / "run")
    assert run.job.tokenizer.decode(run.job.kind._ids(run.job.kind.train[0])) == "[a][b]"
    with pytest.raises(ValueError, match=r"chat_template = '\./nowhere\.jinja' is no file"):
        new_run(Finetuning, supervise(data=data, chat_template="./nowhere.jinja"), tmp_path / "no")


@pytest.mark.parametrize("task", ["dpo", "reward", "grpo"])
def test_a_stage_ends_with_its_best_by_the_score_that_is_shown_first(task, staged, tmp_path):
    given = {"load_best_model_at_end": True, "eval_every": 2, "lr": 0.1}
    result = new_run(Finetuning, staged(task, **given), tmp_path / "run").train()
    judged = [one for one in records.read(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in one]
    name = next(iter(result.scores))
    of_steps = {one["step"]: one[name] for one in judged if not one.get("final")}
    assert len(of_steps) > 1
    assert result.best_step == max(of_steps, key=of_steps.get)
    assert result.scores[name] == of_steps[result.best_step]
