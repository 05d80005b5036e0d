"""Settings: judged when made, read from and written to TOML, overridden in order, complete in the presets."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import get_type_hints

import pytest

from galore_torch.training.pretrain.config import ModelConfig, PretrainConfig, ScheduleConfig
from galore_torch.training.pretrain.presets import CONTINUED, PRESETS, configure
from galore_torch.training.settings.config import from_values, sections_of
from galore_torch.training.settings.fields import plain_type
from galore_torch.training.settings.optimizer import OptimizerConfig
from galore_torch.training.text.config import DataConfig

# facts of the paper: hidden, intermediate, layers, heads, rank, steps
PAPER = {
    "llama-60m": (512, 1376, 8, 8, 128, 10_000),
    "llama-130m": (768, 2048, 12, 12, 256, 20_000),
    "llama-350m": (1024, 2736, 24, 16, 256, 60_000),
    "llama-1b": (2048, 5461, 24, 32, 512, 100_000),
    "llama-7b": (4096, 11008, 32, 32, 1024, 150_000),
}


WITH_BASES = ("galore-adamw8bit", "galore-adamw", "qgalore-adamw8bit")


@pytest.mark.parametrize("preset", PAPER)
def test_a_paper_preset_is_the_papers_recipe(preset):
    config = configure(preset)
    model, optimizer, schedule = config.model, config.optimizer, config.schedule
    shape = (model.hidden, model.intermediate, model.layers, model.heads, optimizer.rank, schedule.steps)
    assert shape == PAPER[preset]
    largest = preset == "llama-7b"
    assert (config.data.seq, schedule.batch, model.dtype) == (256, 16 if largest else 512, "bfloat16")
    assert (schedule.warmup, schedule.final_lr) == (0.1, 0.1)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.scale) == (0.9, 0.999, 0.0, 0.25)
    assert (optimizer.lr, optimizer.update_proj_gap) == ((0.005, 500) if largest else (0.01, 200))


def test_the_largest_preset_takes_the_least_memory_and_clips_where_there_is_something_to_clip():
    config = configure("llama-7b")
    optimizer, schedule = config.optimizer, config.schedule
    assert (optimizer.optim, optimizer.gradients, optimizer.update) == ("galore-adamw8bit", "fused", "backward")
    assert (optimizer.max_grad_norm, schedule.micro_batch, schedule.gradient_checkpointing) == (
        0.0,
        schedule.batch,
        True,
    )
    assert [configure("llama-7b", optim=name).optimizer.basis_bits for name in WITH_BASES] == [8, 16, 4]
    full_rank = configure("llama-7b", optim="adamw").optimizer
    assert (full_rank.gradients, full_rank.update, full_rank.max_grad_norm, full_rank.lr) == (
        "full",
        "step",
        1.0,
        0.001,
    )
    usual = configure("llama-7b", update="step", max_grad_norm=1.0, batch=512, micro_batch=4, lr=1e-3)
    assert (usual.optimizer.gradients, usual.optimizer.max_grad_norm, usual.optimizer.lr) == ("fused", 1.0, 1e-3)
    with pytest.raises(ValueError, match="leaves nothing to clip"):
        configure("llama-7b", max_grad_norm=1.0)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("optimizer", ["galore-adamw", "adamw"])
def test_a_configuration_survives_its_toml(preset, optimizer, tmp_path):
    start = {"model": "somebody/model"} if preset == CONTINUED else {}
    config = configure(preset, optim=optimizer, decomposition="svd", stagger=False, **start)
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    assert configure(file=file) == config


@pytest.mark.parametrize(
    "name",
    ["\N{ROCKET}/texts", 'a "quoted" name', "back\\slash", "two\nlines", "\x7f\x01", "日本", "[/bold]", "''quotes''"],
)
def test_a_name_survives_its_toml_whatever_its_letters(name, tmp_path):
    config = configure("llama-tiny", data=name, cache=name)
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    assert configure(file=file) == config


def test_a_file_that_begins_with_a_mark_of_its_encoding_is_read(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[optimizer]\nrank = 64\n", encoding="utf-8-sig")
    assert configure(file=file).optimizer.rank == 64


NUMBERS = [name for name, hint in get_type_hints(OptimizerConfig).items() if plain_type(hint) is float]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.broad
def test_no_setting_is_infinite(name, value):
    with pytest.raises(ValueError, match=rf"{name} = {value}"):
        OptimizerConfig(**{name: value})


def test_flags_override_the_file_and_the_file_overrides_the_preset(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'preset = "llama-130m"\n[optimizer]\nrank = 64\nupdate_proj_gap = 100\n[schedule]\nwarmup = 0\n',
        encoding="utf-8",
    )
    config = configure(file=file, update_proj_gap=50, rank=None)
    assert (config.model.hidden, config.optimizer.rank, config.optimizer.update_proj_gap) == (768, 64, 50)
    assert config.schedule.warmup == 0.0
    assert configure("llama-350m", file).model.hidden == 1024


def test_a_learning_rate_that_is_given_brings_no_other_with_it():
    assert configure("llama-tiny", optim="adamw").optimizer.others_lr is not None
    assert configure("llama-tiny", optim="adamw", lr=1e-3).optimizer.others_lr is None


def test_no_two_sections_share_a_name():
    names = [field.name for section in sections_of(PretrainConfig).values() for field in dataclasses.fields(section)]
    assert len(names) == len(set(names))


def test_configs_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().hidden = 1
    with pytest.raises(TypeError):
        ModelConfig(512)


@pytest.mark.parametrize(
    ("make", "given", "words"),
    [
        (ModelConfig, {"hidden": 0}, ["hidden = 0", "at least 1"]),
        (ModelConfig, {"hidden": 64, "heads": 3}, ["heads = 3", "hidden = 64", "multiple"]),
        (ModelConfig, {"dtype": "bf16"}, ["dtype = 'bf16'", "did you mean 'bfloat16'"]),
        (DataConfig, {"data": " "}, ["data = ' '", "stdlib"]),
        (DataConfig, {"eval_tokens": 100}, ["eval_tokens = 100", "seq = 256"]),
        (OptimizerConfig, {"rank": 0}, ["rank = 0", "at least 1"]),
        (OptimizerConfig, {"rank": -3}, ["rank = -3", "at least 1"]),
        (OptimizerConfig, {"rank": 1.5}, ["rank = 1.5", "give an int"]),
        (OptimizerConfig, {"update_proj_gap": 0}, ["update_proj_gap = 0", "at least 1"]),
        (OptimizerConfig, {"lr": float("nan")}, ["lr = nan", "more than 0"]),
        (OptimizerConfig, {"scale": float("inf")}, ["scale = inf", "give a finite number"]),
        (OptimizerConfig, {"optim": "galore-adamw8bit", "state_dtype": "float32"}, ["no effect", "galore-sgd"]),
        (DataConfig, {"data": "caf\udce9.txt"}, ["data = 'caf", "UTF-8", "rename"]),
        (ScheduleConfig, {"seed": 2**32}, ["seed = 4294967296", "at most 4294967295"]),
        (OptimizerConfig, {"beta2": 1.0}, ["beta2 = 1.0", "less than 1"]),
        (OptimizerConfig, {"proj_type": "both"}, ["proj_type = 'both'", "std, reverse_std"]),
        (OptimizerConfig, {"optim": "galore-adam"}, ["optim = 'galore-adam'", "did you mean 'galore-adamw'"]),
        (OptimizerConfig, {"optim": "adamw", "state_dtype": "float32"}, ["state_dtype", "'adamw'", "leave it out"]),
        (configure, {"batch": 10, "micro_batch": 4}, ["micro_batch = 4", "batch = 10", "divisor"]),
        (ScheduleConfig, {"shard_bases": True}, ["shard_bases = True", "no effect", "parallel = 'fsdp'"]),
        (ScheduleConfig, {"warmup": 1}, ["warmup = 1 ", "less than 1"]),
        (ScheduleConfig, {"steps": True}, ["steps = True", "bool"]),
        (partial(from_values, PretrainConfig), {"values": {"rnak": 4}}, ["rnak = 4", "did you mean rank"]),
        (configure, {"preset": "llama-2b"}, ["preset = 'llama-2b'", "llama-60m"]),
    ],
)
def test_a_wrong_value_is_told_with_its_field_and_the_remedy(make, given, words):
    with pytest.raises(ValueError, match=r"\S") as caught:
        make(**given)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[optimizer]\nrnak = 4\n", ["rnak = 4", "[optimizer]", "did you mean rank"]),
        ("[model]\nrank = 4\n", ["rank = 4", "[model]"]),
        ("rank = 4\n", ["rank = 4", "no section"]),
        ("[optimiser]\nrank = 4\n", ["optimiser", "[optimizer]"]),
        ("rank 4", ["cannot be read as TOML"]),
        ("[optimizer]\nrank = 'four'\n", ["rank = 'four'", "int"]),
    ],
)
def test_a_wrong_file_is_told(text, words, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"\S") as caught:
        configure(file=file)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_missing_file_is_told():
    with pytest.raises(ValueError, match=r"nowhere\.toml"):
        configure(file=Path("nowhere.toml"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optim": "adamw", "gradients": "fused"}, "gradients = 'fused' has no effect .* choose one of galore-adamw,"),
        ({"optim": "adamw", "cos_threshold": 0.4}, "cos_threshold = 0.4 has no effect .* choose one of galore-adamw,"),
        ({"cos_threshold": 1.1}, "at most 1"),
        ({"gamma_proj": 1.0}, "more than 1"),
        ({"queue_size": 0}, "at least 1"),
        ({"gradients": "projected", "update": "backward"}, "use gradients='full' or 'fused'"),
        ({"update": "backward", "max_grad_norm": 1.0}, "leaves nothing to clip"),
        ({"update": "backward", "batch": 16, "micro_batch": 8}, "give both the same value"),
        ({"gradients": "never"}, "gradients = 'never'"),
    ],
)
def test_forms_of_gradients_that_exclude_something_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        configure("llama-tiny", **given)
