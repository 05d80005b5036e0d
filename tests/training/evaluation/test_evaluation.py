"""After a training: scores and predictions of a run on its own held-out part and on other data, and of any model."""

import csv
import json
import re

import pytest
from typer.testing import CliRunner

from galore_torch.training.evaluation.command import settings_of
from galore_torch.training.finetune.run import Finetuning
from galore_torch.training.pretrain.run import Pretraining
from galore_torch.training.run import records
from galore_torch.training.run.files import MANIFEST, damage
from galore_torch.training.run.run import new_run
from tests.command_line import app
from tests.training.finetune.conftest import *  # noqa: F403 - its fixtures
from tests.training.finetune.conftest import sentences


def told(*arguments) -> str:
    done = CliRunner().invoke(app(), list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_classifier_is_judged_as_at_its_end_and_on_new_rows(classify, labelled, tmp_path):
    out = tmp_path / "run"
    result = new_run(Finetuning, classify(method="galore", steps=8, lr=5e-3), out).train()
    assert json.loads(told("evaluate", out, "--json")) == pytest.approx({"loss": result.eval_loss, **result.scores})
    lines = [json.loads(line) for line in told("predict", out).splitlines()]
    kept = [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [{**line, "probability": pytest.approx(line["probability"], rel=1e-3)} for line in kept]

    new, texts = tmp_path / "new.csv", ["The café's queue 🙂", *(text for text, _ in sentences()[:5])]
    with new.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    told("predict", out, "--data", new, "--out", tmp_path / "said.jsonl")
    lines = (tmp_path / "said.jsonl").read_text(encoding="utf-8").splitlines()
    said = [json.loads(line) for line in lines]
    assert [(line["row"], line["input"]) for line in said] == list(enumerate(texts, 1))
    assert "The café's queue 🙂" in lines[0]  # and no escapes, also where the terminal has another encoding
    shown = CliRunner(charset="latin-1").invoke(app(), ["predict", str(out), "--data", str(new)])
    assert shown.stdout_bytes.decode() == "".join(f"{line}\n" for line in lines)
    assert {line["prediction"] for line in said} <= {"calendar", "heapq"}
    assert "expected" not in said[0]
    by_model = told("evaluate", out / "model", "--task", "classify", "--data", labelled, "--max-length", 32, "--json")
    assert json.loads(by_model) == pytest.approx(
        json.loads(told("evaluate", out, "--data", labelled, "--json")), rel=1e-5
    )
    refused = CliRunner().invoke(app(), ["evaluate", str(out), "--data", str(new)])
    assert refused.exit_code == 2
    assert "label_column = 'label'" in refused.stderr


def test_a_pre_training_is_judged_by_perplexity(tiny, texts, tmp_path):
    result = new_run(Pretraining, tiny(cache=str(tmp_path / "cache")), tmp_path / "run").train()
    found = json.loads(told("evaluate", tmp_path / "run", "--json"))
    assert found["perplexity"] == pytest.approx(result.perplexity, rel=1e-4)
    other = json.loads(told("evaluate", tmp_path / "run", "--data", texts / "heapq.txt", "--json"))
    assert other["perplexity"] != pytest.approx(found["perplexity"], rel=1e-3)
    documents = [path for path in (tmp_path / "cache" / "documents").iterdir() if path.is_dir()]
    assert len(documents) == 2
    for folder in documents:  # whole, so that a run to come need not make it again
        listed = json.loads((folder / MANIFEST).read_text())["files"].keys() | {MANIFEST}
        assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.arrow")} < listed
        assert damage(folder) is None
    refused = CliRunner().invoke(app(), ["evaluate", str(tmp_path / "run"), "--label-column", "stars"])
    assert (refused.exit_code, "label_column = 'stars' has no effect" in refused.stderr) == (2, True)
    on_rows, _ = settings_of(str(tmp_path / "run"), {"task": "sft", "data": "chats.jsonl"})
    assert (on_rows.data.task, on_rows.model.model) == ("sft", str(tmp_path / "run" / "model"))
    refused = CliRunner().invoke(app(), ["predict", str(tmp_path / "run")])
    assert (refused.exit_code, "no rows to predict" in refused.stderr) == (2, True)


@pytest.mark.slow
def test_a_stage_is_judged_by_its_own_trainer(supervise, asked, tmp_path):
    out = tmp_path / "run"
    new_run(Finetuning, supervise(steps=4), out).train()
    scores = records.final(out / "metrics.jsonl")["scores"]
    assert json.loads(told("evaluate", out, "--json"))["perplexity"] == pytest.approx(scores["perplexity"], rel=1e-4)
    said = [
        json.loads(line)
        for line in told("predict", out / "model", "--task", "sft", "--data", asked, "--max-length", 64).splitlines()
    ]
    assert [line["row"] for line in said] == list(range(1, 9))
    assert said[0].keys() == {"row", "input", "expected", "prediction"}


def test_a_folder_that_is_missing_is_named_and_one_without_data_told_apart(tmp_path):
    missing, bare = str(tmp_path / "no" / "run"), str(tmp_path)
    for model, words in ((missing, "is no folder of a run or a model"), (bare, "no run that has data of its own")):
        refused = CliRunner().invoke(app(), ["evaluate", model], env={"COLUMNS": "300"})
        assert refused.exit_code == 2
        said = " ".join(refused.stderr.split())
        assert model in said
        assert words in said
        assert "--data" in said


@pytest.mark.parametrize(
    ("command", "without"),
    [("evaluate", {"answers"}), ("predict", {"answers-only", "no-answers-only"})],
)
def test_flags_are_those_that_have_an_effect(command, without):
    said = CliRunner().invoke(app(), [command, "--help"], env={"COLUMNS": "200"}).stdout
    heeded = {"task", "data", "text-column", "text-pair-column", "label-column", "labels", "max-length"}
    heeded |= {"chat-template", "answers", "answers-only", "no-answers-only", "answer-tokens"} - without
    own = {"help", "json" if command == "evaluate" else "out"}
    assert set(re.findall(r"--([a-z-]+)", said)) == heeded | own
