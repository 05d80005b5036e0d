"""Runs: gone on with exactly after Ctrl-C, stopped in order at any moment, GLUE's recipes, and the command itself."""

import json
import re

import datasets
import pytest
from typer.testing import CliRunner

from galore_torch.training.finetune.config import GLUE
from galore_torch.training.finetune.presets import BY_TASK, PRESETS, configure
from galore_torch.training.finetune.run import Finetuning
from galore_torch.training.run import records
from galore_torch.training.run.checkpoints import step_of
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.run import new_run, resumed_run
from galore_torch.training.settings.methods import TUNING
from tests.command_line import app
from tests.training.during import During, ctrl_c
from tests.training.finetune.conftest import losses, sentences
from tests.training.signalled import signalled

# Going on ------------------------------------------------------------------------------------------------------------


def gone_on_exactly(config, tmp_path, step):
    new_run(Finetuning, config, tmp_path / "whole").train()
    part = new_run(Finetuning, config, tmp_path / "parts", callbacks=[During(step, ctrl_c)]).train()
    assert not part.finished
    assert part.step == step
    assert part.scores == {}
    done = resumed_run(Finetuning, tmp_path / "parts").train()
    assert done.finished
    whole, parts = (records.read(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    told = ("step", "loss", "eval_loss", "lr", "grad_norm", "accuracy", "perplexity")
    assert [{name: one.get(name) for name in told} for one in whole] == [
        {name: one.get(name) for name in told} for one in parts
    ]
    predictions = [(tmp_path / name / "predictions.jsonl").read_text(encoding="utf-8") for name in ("whole", "parts")]
    assert predictions[0] == predictions[1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["galore", "lora", "galore-8bit-per-layer"])
def test_a_classification_goes_on_exactly(classify, tmp_path, method):
    gone_on_exactly(classify(method=method), tmp_path, 5)


@pytest.mark.slow
def test_a_supervised_one_goes_on_exactly_in_the_middle_of_an_epoch(supervise, tmp_path):
    config = supervise(method="galore", rank=8, update_proj_gap=3, gradients="fused", steps=None, epochs=2.0)
    gone_on_exactly(config, tmp_path, 7)


def test_other_rows_are_refused(classify, labelled, write, tmp_path):
    new_run(Finetuning, classify(), tmp_path / "run", callbacks=[During(3, ctrl_c)]).train()
    write("rows.csv", [{"text": text, "label": label} for text, label in sentences()[2:]])
    with pytest.raises(ValueError, match="has changed since the run"):
        resumed_run(Finetuning, tmp_path / "run")


def test_what_has_ended_or_never_began_is_refused(classify, tmp_path):
    new_run(Finetuning, classify(steps=2), tmp_path / "run").train()
    with pytest.raises(ValueError, match="ended after step 2"):
        resumed_run(Finetuning, tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a run"):
        new_run(Finetuning, classify(steps=2), tmp_path / "run")
    with pytest.raises(ValueError, match="holds no run to resume"):
        resumed_run(Finetuning, tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number"),
    [("libraries", 15), ("folder", 2), ("step", 2), ("step", 15), ("end", 2)],
)
def test_a_real_command_leaves_a_state_or_nothing(moment, number, classify, tmp_path):
    out, given = tmp_path / "run", tmp_path / "given.toml"
    given.write_text(classify(steps=10, eval_every=None, method="galore").to_toml(), encoding="utf-8")
    ended = signalled(number, moment, "finetune", "--config", given, "--out", out)
    told, folder = ended.stdout + ended.stderr, RunFolder(out)
    assert "Traceback" not in told
    if moment == "end":  # the finished run is written before the signal counts
        assert ended.returncode == 0, told
        assert records.final(folder.metrics)["step"] == 10
        return
    assert ended.returncode == 128 + number, told
    assert re.search(r"[Ss]topped", told)
    if moment == "step":
        assert 5 <= step_of(folder.checkpoints.newest()) < 10
        assert f"galore finetune --resume --out {out}" in told
        assert resumed_run(Finetuning, out).train().step == 10
    else:
        assert not out.exists()


# GLUE ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the Hub: its splits and columns, with rows of ours."""

    def load(name, task):
        assert name == "nyu-mll/glue"
        lines = [text for text, _ in sentences()]
        columns = GLUE[task].columns
        labels = [len(line) / 14 if GLUE[task].numbers else index % 2 for index, line in enumerate(lines)]
        rows = {column: lines[place:] + lines[:place] for place, column in enumerate(columns)}
        whole = datasets.Dataset.from_dict({**rows, "label": labels, "idx": list(range(len(lines)))})
        return datasets.DatasetDict(
            {"train": whole.select(range(100)), GLUE[task].held_out: whole.select(range(100, 140))}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.parametrize("task", GLUE)
@pytest.mark.broad("cola", "stsb", "mnli")
def test_each_task_of_glue_is_judged_by_its_own_metrics_on_its_own_split(hub, encoder, tmp_path, task):
    config = configure(task=task, model=str(encoder), max_length=48, steps=1, epochs=1.0)
    assert config.schedule.batch == (32 if task == "cola" else 16)
    result = new_run(Finetuning, config, tmp_path / "run").train()
    assert tuple(result.scores) == GLUE[task].metrics
    assert len((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()) == 40


def test_the_presets_are_the_papers():
    for rank, scale in ((4, 4.0), (8, 2.0)):
        config = configure(f"glue-rank{rank}", task="mrpc", method="galore")
        optimizer, schedule = config.optimizer, config.schedule
        assert (optimizer.rank, optimizer.scale, schedule.epochs, schedule.batch) == (rank, scale, 30, 16)
        assert (config.data.max_length, config.model.model) == (512, "FacebookAI/roberta-base")
        assert 1e-5 <= optimizer.lr <= 3e-5
    assert configure(task="cola").schedule.batch == 32
    assert set(BY_TASK) <= set(PRESETS)


@pytest.mark.parametrize("method", TUNING)
@pytest.mark.parametrize("task", ["rte", "classify", "sft"])
@pytest.mark.broad
def test_a_configuration_survives_its_toml(tmp_path, task, method):
    given = {} if task == "rte" else {"data": "rows.csv"}
    config = configure(task=task, method=method, steps=20, **given)
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    assert configure(file=file) == config


# The command ---------------------------------------------------------------------------------------------------------


def test_the_help_teaches():
    told = CliRunner().invoke(app(), ["finetune", "--help"], env={"COLUMNS": "90", "NO_COLOR": "1"})
    assert told.exit_code == 0
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", told.output).split())
    for word in ("galore finetune --task rte", "--label-column", "--answers-only", "glue-rank4", "cola", *TUNING):
        assert word in text
    assert max(map(len, told.output.splitlines())) <= 90


def test_a_run_from_flags_is_shown_and_told(encoder, labelled, tmp_path):
    flags = ["--data", labelled, "--model", str(encoder), "--max-length", "32", "--steps", "6", "--batch", "8"]
    out = tmp_path / "run"
    done = CliRunner().invoke(app(), ["finetune", *flags, "--method", "galore", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert re.search(r"step 1/6  loss \d\.\d+  lr \S+  [\d,]+ examples/s  state [\d.]+ [kMG]B\n", done.output)
    assert re.search(r"accuracy 0\.\d{4}, matthews -?0\.\d{4} on held-out rows", done.output)
    assert f"predictions {out}/predictions.jsonl" in done.output.replace("\n", "")
    told = CliRunner().invoke(app(), ["finetune", *flags, "--out", str(tmp_path / "other"), "--json"])
    assert json.loads(told.stdout)["scores"].keys() == {"accuracy", "matthews"}
    assert len(losses(out)) == 6
