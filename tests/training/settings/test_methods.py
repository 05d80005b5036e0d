"""Methods: named sets of settings, what overrides what, which flags they refuse, and that each of them trains."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from typer.testing import CliRunner

from galore_torch.training.pretrain.presets import PRESETS, configure
from galore_torch.training.pretrain.run import Pretraining
from galore_torch.training.run import records
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.run import new_run, resumed_run
from galore_torch.training.settings.methods import HELP, METHODS
from tests.command_line import app
from tests.training.during import During, ctrl_c
from tests.training.learning import learns

ADAPTED = ("low-rank", "lora", "relora")
PROJECTED = tuple(name for name in METHODS if "galore" in name)
FULL_RANK = tuple(name for name in METHODS if name not in (*ADAPTED, *PROJECTED))
TOKENS = torch.arange(32)[None]


class Logits(TrainerCallback):
    """What the model computes when its training ends."""

    def on_train_end(self, args, state, control, model=None, **_):
        model.eval()
        with torch.no_grad():
            self.logits = model(TOKENS).logits


@pytest.fixture
def by_method(texts: Path, cache: Path):
    """Make the configuration of a run of ten steps by a method, any setting overridden."""

    def make(method, **given):
        settings = {
            "data": str(texts), "cache": str(cache), "vocab": 400, "seq": 32, "eval_tokens": 640, "hidden": 32,
            "intermediate": 64, "layers": 2, "heads": 2, "steps": 10, "batch": 8, "micro_batch": 8, "eval_every": 0,
        }  # fmt: skip
        if method not in FULL_RANK:
            settings |= {"rank": 8}
        if method in PROJECTED:
            settings |= {"update_proj_gap": 4}
        if method == "relora":
            settings |= {"restart_every": 3, "restart_warmup": 0.5}
        return configure("llama-tiny", method=method, **{**settings, **given})

    return make


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records.read(RunFolder(folder).metrics) if "loss" in record]


def test_each_method_has_its_line_of_help():
    assert list(HELP) == list(METHODS)
    assert all(len(name) + 2 + len(line) <= 100 for name, line in HELP.items())


@pytest.mark.parametrize(("preset", "method"), list(itertools.product(PRESETS, METHODS)))
@pytest.mark.broad
def test_a_method_chooses_what_is_trained_and_leaves_the_rest_to_the_preset(preset, method):
    at_once = {"batch": 16, "micro_batch": 16}  # what is applied inside the backward is not accumulated
    config, plain = configure(preset, method=method, **at_once), configure(preset, **at_once)
    assert (config.model, config.data, config.schedule) == (plain.model, plain.data, plain.schedule)
    assert config.optimizer.rank == plain.optimizer.rank
    assert config.optimizer.update == ("backward" if method.endswith("per-layer") else "step")
    assert config.adapter.adapter == (method if method in ADAPTED else "none")
    assert config.adapter.adapter_rank == (plain.optimizer.rank if method in ADAPTED else None)
    assert ("galore" in config.optimizer.optim) is (method in PROJECTED)
    assert ("8bit" in config.optimizer.optim) is ("8bit" in method or "qgalore" in method)
    restarted = config.adapter.restart_every
    assert restarted == (config.schedule.steps // 4 if method == "relora" else None)


@pytest.mark.parametrize("method", METHODS)
def test_a_configuration_by_a_method_survives_its_toml(method, tmp_path):
    config = configure("llama-tiny", method=method)
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    assert configure(file=file) == config


@pytest.mark.parametrize("gradients", ["projected", "fused"])
def test_gradients_that_are_never_whole_want_a_method_without_its_residual(gradients, tmp_path):
    with pytest.raises(ValueError, match=f"gradients = '{gradients}'.*residual = 'full'.*residual = 'none'"):
        configure("llama-tiny", method="galore-muon", gradients=gradients)
    config = configure("llama-tiny", method="galore-muon", gradients=gradients, residual="none")
    assert config.optimizer.group_keys["residual"] is None
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    assert configure(file=file) == config


def test_flags_override_a_method_and_a_method_overrides_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(configure("llama-tiny", method="galore-per-layer", rank=16).to_toml(), encoding="utf-8")
    full = configure(file=file, method="full")
    assert (full.optimizer.optim, full.optimizer.update, full.optimizer.rank) == ("adamw", "step", 16)
    assert full.optimizer.lr == configure("llama-tiny", method="full").optimizer.lr
    lora = configure(file=file, method="lora", adapter_rank=4, optim="sgd", lr=0.5)
    assert (lora.adapter.adapter_rank, lora.optimizer.optim, lora.optimizer.lr) == (4, "sgd", 0.5)
    assert lora.optimizer.others_lr is None
    plain = configure("llama-tiny", method="galore", optim="adamw")  # which forms no gradient as GaLore does
    assert plain.optimizer == configure("llama-tiny", optim="adamw").optimizer
    for method in ("qgalore", "galore-adafactor"):  # whose bits and dtypes say nothing to others
        file.write_text(configure("llama-tiny", method=method).to_toml(), encoding="utf-8")
        assert configure(file=file, method="full").optimizer == configure("llama-tiny", method="full").optimizer


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "gallore"}, ["method = 'gallore'", "did you mean 'galore'"]),
        ({"method": "x"}, ["method = 'x'", "choose one of full, adam8bit"]),
        ({"method": "full", "rank": 64}, ["rank = 64", "method = 'full'", "adapter"]),
        ({"method": "adam8bit", "update_proj_gap": 100}, ["update_proj_gap = 100", "no effect", "galore-adamw"]),
        ({"method": "lora", "scale": 0.5}, ["scale = 0.5", "method = 'lora'"]),
        ({"method": "galore-adafactor", "beta2": 0.99}, ["beta2 = 0.99 has no effect", "leave it out"]),
        ({"method": "galore-8bit", "state_dtype": "bfloat16"}, ["state_dtype = 'bfloat16'", "galore-adamw"]),
        ({"method": "lora", "gradients": "fused"}, ["gradients = 'fused'", "galore-"]),
        ({"method": "low-rank", "weight_bits": 8}, ["weight_bits = 8", "galore-"]),
        ({"method": "relora", "update": "backward"}, ["update = 'backward'", "adapter = 'relora'"]),
        ({"method": "relora", "optim": "adamw8bit"}, ["restart_prune = 0.99", "give restart_prune = 1"]),
        ({"method": "lora", "optim": "galore-adamw"}, ["optim = 'galore-adamw'", "adamw8bit"]),
        ({"method": "lora", "restart_every": 5}, ["restart_every = 5", "adapter = 'relora'", "leave it out"]),
        ({"method": "low-rank", "adapter_dropout": 0.1}, ["adapter_dropout = 0.1", "no effect", "'lora' or 'relora'"]),
        ({"method": "galore", "adapter_rank": 4}, ["adapter_rank = 4", "no effect with adapter = 'none'"]),
        ({"method": "lora", "adapter_rank": 0}, ["adapter_rank = 0", "at least 1"]),
        ({"method": "relora", "restart_prune": 1.5}, ["restart_prune = 1.5", "at most 1"]),
        ({"method": "full", "adapter": "lore"}, ["adapter = 'lore'", "did you mean 'lora'"]),
        ({"method": "full-per-layer", "max_grad_norm": 1.0}, ["max_grad_norm is 1.0", "nothing to clip"]),
        ({"method": "full-per-layer", "batch": 16}, ["micro_batch = 8", "give both the same value"]),
    ],
)  # fmt: skip
def test_what_excludes_each_other_is_told_before_anything_starts(given, words):
    with pytest.raises(ValueError, match=r"\S") as caught:
        configure("llama-tiny", **given)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_flags_that_runs_share_are_refused_for_named_methods_only():
    assert configure("llama-tiny", optim="adamw", rank=4).optimizer.rank == 4


@pytest.mark.slow
@pytest.mark.learning
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_leaves_a_plain_model_that_computes_the_same(method, by_method, tmp_path):
    last = Logits()
    result = learns(new_run(Pretraining, by_method(method), tmp_path / "run", callbacks=[last]), 0.88)
    model, told = AutoModelForCausalLM.from_pretrained(RunFolder(tmp_path / "run").model, output_loading_info=True)
    assert not any(told.values()), told
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, last.logits, rtol=1e-4, atol=1e-5)
    assert result.parameters == model.num_parameters()
    assert (result.trained_parameters < result.parameters) is (method in ADAPTED)
    assert result.adapter == (method if method in ADAPTED else "none")
    assert records.final(RunFolder(tmp_path / "run").metrics)["trained_parameters"] == result.trained_parameters


@pytest.mark.slow
def test_state_is_two_moments_of_what_is_trained(by_method, tmp_path):
    results = {
        method: new_run(Pretraining, by_method(method, steps=1), tmp_path / method).train()
        for method in ("full", "full-per-layer", "adam8bit", "adafactor", *ADAPTED)
    }
    for method in ("full", *ADAPTED):
        steps = 4 * (14 * (2 if method in ADAPTED else 1) + 7)  # one number each
        assert results[method].state_bytes == 2 * 4 * results[method].trained_parameters + steps
    assert results["full-per-layer"].state_bytes == pytest.approx(results["full"].state_bytes, rel=0.01)
    assert len({results[method].trained_parameters for method in ADAPTED}) == 1
    for method in ("adafactor", "adam8bit", *ADAPTED):
        assert results[method].state_bytes < results["full"].state_bytes


@pytest.mark.parametrize("pair", [("full", "full-per-layer"), ("galore", "galore-per-layer")], ids=" ".join)
@pytest.mark.slow
def test_moving_each_weight_inside_the_backward_changes_nothing_but_cost(pair, by_method, tmp_path):
    at_step, per_layer = (new_run(Pretraining, by_method(method), tmp_path / method).train() for method in pair)
    assert per_layer.eval_loss == pytest.approx(at_step.eval_loss, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "stop", "given"),
    [
        ("low-rank", 4, {}),
        ("lora", 4, {"adapter_dropout": 0.3}),
        ("relora", 6, {}),  # at a restart
        ("relora", 5, {"restart_prune": 1.0, "optim": "adamw8bit"}),  # while it warms up again
        ("relora", 2, {"batch": 8, "micro_batch": 4, "adapter_dropout": 0.3, "dtype": "bfloat16"}),
        ("full-per-layer", 4, {}),
        ("adam8bit", 4, {}),
        ("qgalore", 4, {}),
    ],
)
def test_a_run_by_a_method_that_was_interrupted_goes_on_exactly(method, stop, given, by_method, tmp_path):
    config = by_method(method, **given)
    new_run(Pretraining, config, tmp_path / "whole").train()
    stopped = new_run(Pretraining, config, tmp_path / "parts", callbacks=[During(stop, ctrl_c)]).train()
    assert (stopped.finished, stopped.step) == (False, stop)
    assert resumed_run(Pretraining, tmp_path / "parts").train().finished
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    kept, remade = (load_file(RunFolder(tmp_path / name).model / "model.safetensors") for name in ("whole", "parts"))
    assert kept.keys() == remade.keys()
    assert all(torch.equal(kept[name], remade[name]) for name in kept)


def test_the_command_takes_a_method_and_names_the_folder_after_it(texts, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = (
        f"pretrain --method lora --data {texts} --cache {cache} --vocab 400 --seq 32 --eval-tokens 640 --hidden 32 "
        "--intermediate 64 --layers 1 --heads 2 --rank 4 --steps 2 --batch 4 --micro-batch 4 --eval-every 0"
    ).split()
    done = CliRunner().invoke(app(), flags)
    assert done.exit_code == 0, done.output
    assert "lora-adamw on a LLaMA" in done.output
    assert (tmp_path / "runs" / "llama-tiny-lora" / "model" / "model.safetensors").exists()
    again = CliRunner().invoke(app(), ["pretrain", "--resume", "--out", "x", "--method", "lora"])
    assert "leave out method" in again.stderr


@pytest.mark.parametrize("width", [80, 100])
def test_the_help_tells_every_method(width):
    shown = CliRunner().invoke(app(), ["pretrain", "--help"], env={"COLUMNS": str(width), "NO_COLOR": "1"}).output
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", shown).split())
    assert all(f"{name} {line}" in text for name, line in HELP.items())
