"""What is looked at: runs and models of every kind, by their own recipes, and nothing of them changed."""

import hashlib
import shutil
import signal

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, TrainerCallback

from galore_torch.training.inspection.config import configure
from galore_torch.training.inspection.jobs import job_of_run
from galore_torch.training.inspection.observer import GradientObserver, observed_trainer
from galore_torch.training.pretrain.run import Pretraining
from galore_torch.training.run import records
from galore_torch.training.run.checkpoints import step_of
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.run import new_run
from tests.training.inspection.looking import MODULES, digests, inspected, of_model, of_run

pytestmark = pytest.mark.slow


def losses(folder):
    made = records.read(RunFolder(folder).metrics)
    return [round(record["loss"], 6) for record in made if "loss" in record]


class Spy(TrainerCallback):
    """Keeps all gradients, as no inspection would."""

    def __init__(self, weights):
        self.weights, self.kept = weights, {}

    def on_pre_optimizer_step(self, args, state, control, **_):
        for name, weight in self.weights.items():
            self.kept[state.global_step + 1, name] = weight.grad.double().clone()


def test_figures_of_a_run_are_those_of_the_svds_of_its_gradients(run, tmp_path):
    config = configure(steps=6, every=2, oldest=4, rank=8)
    observer = GradientObserver(job_of_run(run, config.snapshots, Console(quiet=True)), config)
    spy = Spy(observer.weights)
    observed_trainer(observer, str(tmp_path), spy).train()
    assert len(observer.histories) == 14
    for history in observer.histories:
        grads = [spy.kept[step, history.name] for step in (2, 4, 6)]
        assert not torch.equal(grads[0], grads[1])
        for snapshot, grad in zip(history.snapshots, grads, strict=True):
            values = torch.linalg.svdvals(grad).square()
            assert snapshot.own == pytest.approx(float(values[:8].sum() / values.sum()), rel=1e-6)
        left, _, right = torch.linalg.svd(grads[0], full_matrices=False)
        tall = grads[2].shape[0] > grads[2].shape[1]
        image = grads[2] @ right.mT[:, :8] if tall else left[:, :8].mT @ grads[2]
        expected = float(image.square().sum() / grads[2].square().sum())
        assert history.pairs[1:].tolist() == [1]
        assert float(history.captured[1, 7]) == pytest.approx(expected, rel=1e-5)


def test_fresh_makes_the_very_steps_of_the_run(run):
    assert of_run(run, fresh=True, steps=8, every=4)["losses"] == losses(run)


def test_a_stopped_run_is_inspected_from_its_checkpoint(tiny, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                signal.raise_signal(signal.SIGINT)

    new_run(Pretraining, tiny(eval_every=0), tmp_path / "run", callbacks=[Stop()]).train()
    before, folder = digests(tmp_path / "run"), RunFolder(tmp_path / "run")
    stopped = step_of(folder.checkpoints.newest())
    told = of_run(tmp_path / "run")
    assert f"after its step {stopped}" in told["subject"]
    assert told["facts"]["weights"].endswith(f"checkpoint-{stopped}")
    rate = next(record["lr"] for record in records.read(folder.metrics) if record["step"] == stopped)
    assert told["facts"]["learning rate"] == f"constant {rate:g}"
    assert digests(tmp_path / "run") == before


def test_a_fine_tuning_is_inspected_from_both_ends(tuning):
    before = digests(tuning)
    end, fresh = of_run(tuning), of_run(tuning, fresh=True)
    assert fresh["losses"] == losses(tuning)
    assert list(end["modules"]) == list(fresh["modules"]) == MODULES
    assert end["rank"] == 4
    assert digests(tuning) == before
    with pytest.raises(ValueError, match="steps = 8 is beyond the 6 steps that the run makes in all"):
        of_run(tuning, fresh=True, steps=8)


def test_a_model_is_inspected_on_text_and_on_rows(run, rows, texts, cache):
    model = RunFolder(run).model
    text = of_model(model, texts, cache=str(cache), max_length=32, rank=8, target_modules="mlp")
    assert list(text["modules"]) == ["gate_proj", "up_proj", "down_proj"]
    assert (text["rank"], text["facts"]["tokens of a sequence, at most"]) == (8, "32")
    classes = of_model(model, rows, task="classify", max_length=16, rank=4)
    assert list(classes["modules"]) == MODULES
    chats = of_model(model, rows, task="sft", max_length=16, rank=4)
    assert list(chats["modules"]) == MODULES


def test_int8_weights_are_inspected_as_they_were_saved(tiny, tmp_path):
    new_run(Pretraining, tiny(eval_every=0, weight_bits=8, optim="qgalore-adamw8bit"), tmp_path / "run").train()
    told = of_run(tmp_path / "run")
    assert any("INT8" in note for note in told["notes"])
    assert list(told["modules"]) == MODULES


def test_an_adapters_run_is_refused_with_what_can_be_inspected(tiny, tmp_path):
    config = tiny(optim="adamw", adapter="lora", adapter_rank=4)
    RunFolder(tmp_path / "run").create(config, "0" * 64)
    result = inspected("--run", tmp_path / "run", "--out", tmp_path / "out", code=2)
    assert "trained adapter = 'lora'" in result.stderr
    assert f"--model {tmp_path / 'run' / 'model'} --data" in result.stderr


def test_a_run_that_saved_nothing_can_be_inspected_fresh(tiny, tmp_path):
    RunFolder(tmp_path / "run").create(tiny(), "0" * 64)
    result = inspected("--run", tmp_path / "run", "--out", tmp_path / "out", code=2)
    assert "holds neither a finished model nor a checkpoint; give --fresh" in result.stderr
    assert any("have changed" in note for note in of_run(tmp_path / "run", fresh=True)["notes"])


def test_gradients_that_are_not_finite_are_told(run, tmp_path):
    broken = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(RunFolder(run).model)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    model.save_pretrained(broken)
    for path in RunFolder(run).model.glob("tokenizer*"):
        (broken / path.name).write_bytes(path.read_bytes())
    data = tmp_path / "text.txt"
    data.write_text("\n\n".join(f"some words and {place} more" for place in range(400)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"has weights that are not finite: model\.norm\.weight"):
        of_model(broken, data, cache=str(tmp_path / "cache"), max_length=16, rank=4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps = [", "cannot be read as TOML"),
        ("data = 3\nadapter = 4", "is no section"),
        ("[data]\ntask = 'rte'\ntanks = 4", "tanks = 4 .* is no setting"),
        ("[optimizer]\nrank = 0", "rank = 0 is out of range"),
    ],
)
def test_a_run_whose_settings_are_broken_is_refused(text, words, tmp_path):
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    digests = {"text": "0" * 64, "config.toml": hashlib.sha256(text.encode()).hexdigest()}
    (tmp_path / "text.sha256").write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    with pytest.raises(ValueError, match=words):
        of_run(tmp_path, fresh=True)


def test_weights_that_are_broken_are_refused(run, texts, cache, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    model = tmp_path / "run" / "model"
    (model / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"run.*model.safetensors"):
        of_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"model = .*model.safetensors"):
        of_model(model, texts, cache=str(cache), max_length=32)


def test_weights_that_stand_still_tell_the_noise_of_the_batch(run):
    """At a learning rate of next to nothing gradients differ by their batches alone, and no basis grows old."""
    still = of_run(run, lr=1e-12, steps=16, every=2)
    assert still["modules"].keys() == set(MODULES)
    for group in still["modules"].values():
        assert group["captured"]["2"] < group["own"]
        assert group["captured"]["12"] == pytest.approx(group["captured"]["2"], abs=0.15)
