"""Training further: from any causal model or another architecture, and runs that are made longer."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, T5Config

from galore_torch.training.pretrain.config import SIZES
from galore_torch.training.pretrain.presets import configure
from galore_torch.training.pretrain.run import Pretraining
from galore_torch.training.run import records
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.run import new_run, resumed_run
from tests.training.during import During, ctrl_c
from tests.training.pretrain.test_pretrain import assert_same_run, weights


@pytest.fixture(scope="module")
def first(tiny, tmp_path_factory) -> Path:
    """A finished run of four steps."""
    out = tmp_path_factory.mktemp("first") / "run"
    new_run(Pretraining, tiny(steps=4, eval_every=0), out).train()
    return out


@pytest.fixture
def further(texts, cache):
    """Make the configuration of a training that goes on from a model, any setting overridden."""

    def make(**given):
        settings = {
            "data": str(texts), "cache": str(cache), "seq": 32, "eval_tokens": 640, "rank": 8, "steps": 4, "batch": 8,
            "micro_batch": 8, "eval_every": 0,
        }  # fmt: skip
        return configure(**{**settings, **given})

    return make


def step_records(out: Path) -> list[dict]:
    return [record for record in records.read(RunFolder(out).metrics) if "loss" in record]


def test_a_run_goes_on_from_the_model_of_another_with_its_tokenizer(first, further, tmp_path):
    config = further(model=str(first))
    assert config.model.model == str(first / "model")
    assert [getattr(config.model, name) for name in SIZES] == [None] * 4
    assert configure(file=_written(config, tmp_path)) == config
    new_run(Pretraining, config, tmp_path / "whole").train()
    losses = [record["loss"] for record in step_records(tmp_path / "whole")]
    assert losses[0] < step_records(first)[0]["loss"] - 0.2  # not from scratch; by 0.4 to 0.5
    tokens = [AutoTokenizer.from_pretrained(out / "model").get_vocab() for out in (first, tmp_path / "whole")]
    assert tokens[0] == tokens[1]

    new_run(Pretraining, config, tmp_path / "parts", callbacks=[During(2, ctrl_c)]).train()
    resumed_run(Pretraining, tmp_path / "parts").train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def _written(config, folder: Path) -> Path:
    file = folder / "config.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    return file


@pytest.mark.parametrize("method", ["galore", "lora"])
@pytest.mark.broad("galore")
def test_another_architecture_is_trained_from_scratch(method, further, tmp_path):
    GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64).save_pretrained(tmp_path / "gpt2")
    config = further(config_of=str(tmp_path / "gpt2" / "config.json"), tokenizer="train", vocab=400, lr=1e-2,
                     method=method, dtype="float32")  # fmt: skip
    result = new_run(Pretraining, config, tmp_path / "run").train()
    assert result.renewals == (8 if method == "galore" else 0)  # each of two layers has four matrices
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert (model.config.model_type, model.config.vocab_size) == ("gpt2", 400)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").model_max_length == 64


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": "{first}", "hidden": 8}, ["hidden = 8", "no effect with model"]),
        ({"model": "{first}", "config_of": "x"}, ["config_of = 'x'", "no effect with model"]),
        ({"model": "{first}", "tokenizer": "t5-base"}, ["tokenizer = 't5-base'", "brings its own"]),
        ({"model": "{first}", "method": "low-rank"}, ["low-rank", "learnt"]),
        ({"gguf_file": "x.gguf"}, ["gguf_file = 'x.gguf'", "no effect"]),
        ({"hidden": 64, "heads": 3}, ["heads = 3", "hidden = 64"]),
    ],
)
def test_settings_that_do_not_fit_a_model_are_refused(given, words, first):
    with pytest.raises(ValueError, match=r"\S") as caught:
        configure(
            **{name: str(value).format(first=first) if name == "model" else value for name, value in given.items()}
        )
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_is_no_causal_model_is_refused(first, further, tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded"):
        new_run(Pretraining, further(config_of=str(tmp_path / "nowhere"), rank=4), tmp_path / "run")
    T5Config(d_model=8, num_layers=1, num_heads=2).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="is a t5, not a causal model"):
        new_run(Pretraining, further(config_of=str(tmp_path / "t5"), rank=4), tmp_path / "run")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": -8, "n_head": 2}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"makes no model: .*Mend it"):
        new_run(Pretraining, further(config_of=str(tmp_path / "config.json"), rank=4), tmp_path / "run")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.toml").touch()
    with pytest.raises(ValueError, match="no finished model yet"):
        further(model=str(tmp_path / "begun"))
    with pytest.raises(ValueError, match="beyond the 1024 positions"):
        new_run(
            Pretraining, further(model=str(first), seq=2048, eval_tokens=2048, batch=1, micro_batch=1), tmp_path / "run"
        )


# Longer --------------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_extended_and_says_so(first, tiny, tmp_path):
    longer = tmp_path / "run"
    new_run(Pretraining, tiny(steps=4, eval_every=0), longer).train()
    before = RunFolder(longer).config.read_text(encoding="utf-8")
    result = resumed_run(Pretraining, longer, changes={"steps": 10, "micro_batch": 8}).train()
    assert (result.finished, result.step) == (True, 10)
    made = step_records(longer)
    assert [record["step"] for record in made] == list(range(1, 11))
    assert made[:4] == [{**record, **_times(own)} for record, own in zip(step_records(first), made[:4], strict=True)]
    whole = Pretraining.recorded(RunFolder(longer))
    assert (whole.schedule.steps, whole.schedule.micro_batch) == (10, 8)
    assert RunFolder(longer).config.read_text(encoding="utf-8") == before
    assert [json.loads(line) for line in RunFolder(longer).changes.read_text(encoding="utf-8").splitlines()] == [
        {"step": 4, "steps": [4, 10], "micro_batch": [4, 8]}
    ]
    assert [record["step"] for record in records.read(RunFolder(longer).metrics) if "final" in record] == [10]
    assert any((weights(longer)[name] != weights(first)[name]).any() for name in weights(first))
    # from there on by the schedule of ten steps
    new_run(Pretraining, tiny(steps=10, eval_every=0), tmp_path / "ten").train()
    assert [record["lr"] for record in made[5:]] == [record["lr"] for record in step_records(tmp_path / "ten")[5:]]


def _times(record: dict) -> dict:
    return {name: record[name] for name in ("seconds", "tokens_per_second")}


@pytest.mark.slow
def test_a_run_that_is_extended_and_stopped_goes_on_exactly(tiny, tmp_path):
    for name, more in (("whole", []), ("parts", [During(6, ctrl_c)])):
        new_run(Pretraining, tiny(steps=4), tmp_path / name).train()
        resumed_run(Pretraining, tmp_path / name, changes={"steps": 8}, callbacks=more).train()
    resumed_run(Pretraining, tmp_path / "parts").train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "ended after step 4; .* longer by --steps"),
        ({"eval_every": 2}, "ended after step 4"),
        ({"steps": 4}, "steps = 4, and the run has made 4; give more"),
        ({"steps": 8, "lr": 1.0}, r"leave out lr\. What may change is steps, .*--model"),
        ({"epochs": 2.0}, "epochs = 2.0 is no setting of a pre-training"),
        ({"steps": 8, "micro_batch": 3}, "micro_batch = 3 does not divide"),
    ],
)
def test_changes_that_a_run_cannot_take_are_refused_and_leave_it_as_it_was(changes, words, first):
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=words):
        resumed_run(Pretraining, first, changes=changes)
    now = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert {path: text for path, text in now.items() if path.name != "run.lock"} == {
        path: text for path, text in before.items() if path.name != "run.lock"
    }


def test_a_finished_run_without_its_checkpoints_is_not_started_over(first, tmp_path):
    run = tmp_path / "my run"
    shutil.copytree(first, run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match=r"checkpoints are gone: .*--model '.*my run'"):
        RunFolder(run).require_unfinished({"steps": 8})
    assert (run / "model").is_dir()
