"""The best checkpoint as the model, a training that ends when nothing gets better, and a model that is pushed."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from typer.testing import CliRunner

from galore_torch.training.finetune.run import Finetuning
from galore_torch.training.run import records
from galore_torch.training.run.checkpoints import Checkpoints, step_of
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.run import new_run, resumed_run
from tests.command_line import app
from tests.training.during import During, crash, ctrl_c
from tests.training.finetune.conftest import losses

# The rate is far too great, so that the loss rises again after the first evaluations.
WORSENING = {
    "steps": 40, "eval_every": 3, "lr": 0.1, "decay": "constant", "load_best_model_at_end": True,
    "metric_for_best_model": "loss", "early_stopping_patience": 3,
}  # fmt: skip


def judged(folder: Path) -> dict[int, float]:
    """Return the losses of a run's evaluations by step."""
    kept = records.read(folder / "metrics.jsonl")
    return {one["step"]: one["eval_loss"] for one in kept if "eval_loss" in one and not one.get("final")}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def worsened(tmp_path_factory):
    return tmp_path_factory.mktemp("worsened") / "run"


@pytest.fixture
def ended(classify, worsened):
    """A run that has ended early, its settings, and what it came to."""
    if not worsened.exists():
        new_run(Finetuning, classify(**WORSENING), worsened).train()
    return worsened, records.final(worsened / "metrics.jsonl")


def test_a_run_ends_early_with_the_model_and_the_scores_of_its_best_evaluation(ended):
    folder, final = ended
    found = judged(folder)
    best = min(found, key=found.get)
    assert final["best_step"] == best
    assert final["step"] == best + 3 * 3 == max(found) < 40
    assert final["eval_loss"] == found[best] < found[final["step"]]
    kept = RunFolder(folder).checkpoints
    assert same(weights(folder / "model"), weights(kept.of(best)))
    assert not same(weights(folder / "model"), weights(kept.of(final["step"])))
    assert "early_stopping_patience = 3" in (folder / "config.toml").read_text()


@pytest.mark.parametrize("act", [ctrl_c, crash])
@pytest.mark.broad("crash")
def test_it_is_resumed_exactly_with_its_best_and_its_count(act, ended, classify, tmp_path):
    whole, final = ended
    out = tmp_path / "run"
    stop = During(final["step"] - 1, act)
    if act is crash:
        with pytest.raises(RuntimeError, match="went down"):
            new_run(Finetuning, classify(**WORSENING), out, callbacks=[stop]).train()
    else:
        assert not new_run(Finetuning, classify(**WORSENING), out, callbacks=[stop]).train().finished
    result = resumed_run(Finetuning, out).train()
    assert result.finished
    assert (result.step, result.best_step, result.eval_loss) == (final["step"], final["best_step"], final["eval_loss"])
    assert losses(out) == losses(whole)
    assert same(weights(out / "model"), weights(whole / "model"))


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("run.*"))
    return to


def test_one_that_was_killed_after_its_end_makes_no_further_step(ended, tmp_path):
    whole, final = ended
    out = copied(whole, tmp_path / "run")
    records.keep_until(out / "metrics.jsonl", final["step"], final=False)
    shutil.rmtree(out / "model")
    result = resumed_run(Finetuning, out).train()
    assert (result.step, result.eval_loss) == (final["step"], final["eval_loss"])
    assert losses(out) == losses(whole)
    assert same(weights(out / "model"), weights(whole / "model"))


def test_it_goes_on_with_more_patience_alone(ended, tmp_path):
    whole, final = ended
    out = copied(whole, tmp_path / "run")
    with pytest.raises(ValueError, match=f"ended after step {final['step']}"):
        resumed_run(Finetuning, out)
    with pytest.raises(ValueError, match=r"early_stopping_patience = 3, and 3 evaluations .* more than 3"):
        resumed_run(Finetuning, out, changes={"steps": 60})
    result = resumed_run(Finetuning, out, changes={"early_stopping_patience": 4}).train()
    assert result.step >= final["step"] + 3
    assert losses(out)[: final["step"]] == losses(whole)


def test_a_damaged_best_checkpoint_is_told_before_it_is_needed(ended, tmp_path):
    whole, final = ended
    out = copied(whole, tmp_path / "run")
    records.keep_until(out / "metrics.jsonl", final["step"], final=False)
    (RunFolder(out).checkpoints.of(final["best_step"]) / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-\d+ is damaged: model.safetensors is missing"):
        resumed_run(Finetuning, out)


@pytest.mark.parametrize("method", ["galore-8bit-per-layer", "qgalore", "lora", "relora"])
@pytest.mark.broad("lora")
def test_whatever_trains_ends_with_its_best(method, supervise, tmp_path):
    given = {"steps": 12, "eval_every": 3, "lr": 0.3, "decay": "constant", "load_best_model_at_end": True, "rank": 4}
    result = new_run(Finetuning, supervise(method=method, **given), tmp_path / "run").train()
    found = judged(tmp_path / "run")
    assert result.best_step == min(found, key=found.get)
    again = CliRunner().invoke(app(), ["evaluate", str(tmp_path / "run"), "--json"])
    assert json.loads(again.stdout)["loss"] == pytest.approx(found[result.best_step], rel=1e-4)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"early_stopping_patience": 2}, "choose load_best_model_at_end"),
        ({"metric_for_best_model": "loss"}, "choose load_best_model_at_end"),
        ({"load_best_model_at_end": True, "save_every": 3}, "save_every = 3 has no effect"),
        ({"load_best_model_at_end": True, "early_stopping_patience": 0}, "at least 1"),
    ],
)
def test_what_has_no_effect_is_refused(given, told, classify):
    with pytest.raises(ValueError, match=told):
        classify(**given)


def test_a_score_that_is_not_measured_is_refused_with_those_that_are(classify, tmp_path):
    with pytest.raises(ValueError, match="'acuracy' is not measured; choose one of accuracy, matthews, f1, pearson"):
        classify(load_best_model_at_end=True, metric_for_best_model="acuracy")
    config = classify(load_best_model_at_end=True, metric_for_best_model="pearson")  # of numbers, and these are classes
    with pytest.raises(ValueError, match="'pearson' is not measured; choose one of accuracy, matthews, loss"):
        new_run(Finetuning, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_best_checkpoint_of_the_one_before_the_newest_stays_too(tmp_path):
    kept, before = Checkpoints(tmp_path), None
    for step, best in ((4, 4), (8, 4), (12, 12), (16, 12), (20, 12), (24, 24)):
        written = kept.tmp / f"checkpoint-{step}"
        written.mkdir(parents=True)
        (written / "trainer_state.json").write_text(json.dumps({"best_global_step": best}), encoding="utf-8")
        before = kept.complete(step, before=before)
        assert kept.best(before) == kept.of(best)
        for each in kept.newest_first()[:2]:  # from any of which a run may have to go on
            assert kept.best(each).is_dir()
    assert [step_of(each) for each in kept.newest_first()] == [24, 20, 12]


# Pushing -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the Hub: what is uploaded to which repository, or the error that is raised instead."""
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    told = {"uploaded": {}, "refused": None, "failed": None}

    def create_repo(_self, name, *, exist_ok):
        assert exist_ok
        if told["refused"] is not None:
            raise told["refused"]
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{name.rpartition('/')[2]}")

    def upload_folder(_self, *, repo_id, folder_path, commit_message):
        assert commit_message
        if told["failed"] is not None:
            raise told["failed"]
        told["uploaded"][repo_id] = sorted(path.name for path in Path(folder_path).iterdir())
        address = f"https://huggingface.co/{repo_id}"
        return SimpleNamespace(commit_url=f"{address}/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return told


def test_a_finished_model_is_pushed(hub, classify, tmp_path):
    config = classify(steps=6, push_to_hub="reviews")
    new_run(Finetuning, config, tmp_path / "run", callbacks=[During(3, ctrl_c)]).train()
    assert hub["uploaded"] == {}
    resumed_run(Finetuning, tmp_path / "run").train()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub["uploaded"]["me/reviews"])
    assert 'push_to_hub = "reviews"' in (tmp_path / "run" / "config.toml").read_text()


def test_a_missing_token_is_told_before_anything_is_read(monkeypatch, encoder, labelled, tmp_path):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    flags = ["--data", labelled, "--model", str(encoder), "--max-length", "32", "--push-to-hub", "reviews"]
    done = CliRunner().invoke(app(), ["finetune", *flags, "--out", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert "hf auth login" in done.stderr
    assert "HF_TOKEN" in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_the_hub_refuses_is_told_before_the_training(hub, classify, tmp_path):
    hub["refused"] = OSError("403 Forbidden")
    with pytest.raises(ValueError, match=r"push_to_hub = 'reviews' is refused .* 403 Forbidden"):
        new_run(Finetuning, classify(push_to_hub="reviews"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_push_that_fails_leaves_the_finished_run_and_says_how_to_go_on(hub, classify, tmp_path):
    hub["failed"] = ConnectionError("no route to host")
    out, given = tmp_path / "run", tmp_path / "given.toml"
    given.write_text(classify(steps=2, push_to_hub="reviews").to_toml(), encoding="utf-8")
    done = CliRunner().invoke(app(), ["finetune", "--config", str(given), "--out", str(out)])
    assert done.exit_code == 1
    assert "no route to host" in done.stderr
    assert f"hf upload me/reviews {out}/model" in done.stderr
    assert "holds the finished run" in done.stderr
    assert records.final(out / "metrics.jsonl")["step"] == 2


@pytest.mark.parametrize(
    ("flags", "told"), [("--push-to-hub reviews", "hf upload"), ("--early-stopping-patience 2", "equal length")]
)
def test_a_comparison_refuses_what_is_for_one_run(flags, told, encoder, labelled, tmp_path):
    given = ["--data", labelled, "--model", str(encoder), "--out", str(tmp_path / "compared"), *flags.split()]
    done = CliRunner().invoke(app(), ["compare", "finetune", *given])
    assert done.exit_code == 2
    assert told in done.stderr
