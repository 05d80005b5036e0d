"""What a run folder records is what ran: every setting that has an effect, as optimizer, trainer and model have it."""

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import galore_torch
from galore_torch import GaLore
from galore_torch.group_keys import KEYS, PROJECTED_DEFAULTS
from galore_torch.lowbit import QuantizedWeight
from galore_torch.training.baselines.layers import LowRankLinear, lora_layers
from galore_torch.training.baselines.restarts import Restarts
from galore_torch.training.pretrain.config import PretrainConfig
from galore_torch.training.pretrain.presets import configure
from galore_torch.training.pretrain.run import Pretraining
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.run import new_run
from galore_torch.training.settings.config import sections_of
from galore_torch.training.settings.methods import METHODS, has_effect
from galore_torch.training.settings.optimizer import OptimizerConfig
from tests.command_line import app

OTHER = {  # than by default and than any method's own
    "lr": 0.003, "others_lr": 0.002, "rank": 5, "update_proj_gap": 7, "scale": 0.5, "proj_type": "right",
    "decomposition": "svd", "stagger": False, "cos_threshold": 0.25, "gamma_proj": 3.0, "queue_size": 4,
    "layout": "stack", "basis_group_size": 64,
    "beta1": 0.8, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1, "max_grad_norm": 0.7, "state_dtype": "bfloat16",
    "basis_bits": 16, "gradients": "fused", "grad_bits": 8, "weight_bits": 8, "weight_rounding": "nearest",
    "others_bits": 4, "save_inputs": "full", "adapter_rank": 3, "adapter_alpha": 7.0, "adapter_dropout": 0.5,
    "restart_every": 3, "restart_warmup": 0.4, "restart_prune": 0.5,
    "steps": 10, "batch": 16, "micro_batch": 4, "gradient_checkpointing": True, "warmup": 0.4,
    "final_lr": 0.3, "seed": 3, "eval_every": 5, "save_every": 4, "hidden": 64, "intermediate": 96, "layers": 1,
    "heads": 4, "dtype": "bfloat16", "vocab": 300, "seq": 48,
}  # fmt: skip
GROUP_KEYS = (*KEYS, "lr", "weight_decay")
ELSEWHERE = {"data", "subset", "text_column", "tokenizer", "eval_tokens", "cache", "report_to", "adapter", "optim"}
ELSEWHERE |= {"model", "gguf_file", "config_of", "parallel", "shard_bases", "rank_pattern", "push_to_hub"}
"""What the text is, which the digest tells; which models, trackers, adapters and optimizers there are, by name; what
several processes do (`test_processes`), ranks by module (`test_optimizers`), and the Hub (`test_best`)."""


@pytest.fixture
def by_method(texts: Path, cache: Path):
    def make(method, **given):
        settings = {
            "data": str(texts), "cache": str(cache), "vocab": 400, "seq": 32, "eval_tokens": 640, "hidden": 32,
            "intermediate": 64, "layers": 2, "heads": 2, "batch": 8, "micro_batch": 8, "rank": 8,
        }  # fmt: skip
        # By its settings, not by its name, which refuses what has no effect on it.
        return configure("llama-tiny", **{**settings, **METHODS[method], **given})

    return make


def of_optimizer(run, attached) -> dict[str, object]:
    optimizer = run.trainer.create_optimizer()
    matrices, others = optimizer.param_groups[0], optimizer.param_groups[-1]
    found = {name: matrices[name] for name in GROUP_KEYS if name in matrices}
    found["others_lr"] = others["lr"]
    if isinstance(optimizer, GaLore):
        assert optimizer._settings["seed"] == run.config.schedule.seed
        dtype = optimizer._settings["state_dtype"]
        bits = {"AdamW8bit": 8, "AdamW4bit": 4}
        found["others_bits"] = bits.get(optimizer._rules.fallback.name.rpartition(".")[2])
        found["state_dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
    for group in (others, matrices):
        if "betas" in group:
            found["beta1"], found["beta2"] = group["betas"]
            found["eps"] = group["eps"]
    if "momentum" in matrices:
        found["beta1"] = matrices["momentum"]
    quantized = [weight for weight in matrices["params"] if isinstance(weight, QuantizedWeight)]
    found["weight_bits"] = 8 if quantized else 16
    found["weight_rounding"] = "nearest" if quantized and quantized[0].seed is None else "stochastic"
    of_attach = ("gradients", "update", "grad_bits", "save_inputs")
    found |= zip(of_attach, attached or ("full", "step", 16, "projected"), strict=True)
    return found


def of_adapters(run) -> dict[str, object]:
    found = {}
    for _, layer in lora_layers(run.model):
        dropout = getattr(layer.lora_dropout["default"], "p", 0.0)
        found |= {"adapter_rank": layer.r["default"], "adapter_dropout": dropout}
        found["adapter_alpha"] = layer.lora_alpha["default"]
    for module in run.model.modules():
        if isinstance(module, LowRankLinear):
            found["adapter_rank"] = module.A.out_features
    for callback in run.trainer.callback_handler.callbacks:
        if isinstance(callback, Restarts):
            share = pytest.approx(callback.warmup / callback.every, abs=0.5 / callback.every)
            found |= {"restart_every": callback.every, "restart_warmup": share, "restart_prune": callback.prune}
    return found


def of_trainer(run) -> dict[str, object]:
    args, model = run.trainer.args, run.model
    assert args.seed == args.data_seed
    return {
        "max_grad_norm": args.max_grad_norm,
        "steps": args.max_steps,
        "micro_batch": args.per_device_train_batch_size,
        "batch": args.per_device_train_batch_size * args.gradient_accumulation_steps,
        "gradient_checkpointing": model.is_gradient_checkpointing,
        "warmup": pytest.approx(args.warmup_steps / args.max_steps, abs=0.5 / args.max_steps),
        "final_lr": args.lr_scheduler_kwargs["min_lr_rate"],
        "seed": args.seed,
        "eval_every": args.eval_steps,
        "save_every": 0 if args.save_steps == args.max_steps else args.save_steps,
        "hidden": model.config.hidden_size,
        "intermediate": model.config.intermediate_size,
        "layers": model.config.num_hidden_layers,
        "heads": model.config.num_attention_heads,
        "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
        "vocab": model.config.vocab_size,
        "seq": len(run.trainer.train_dataset[0]["input_ids"]),
    }


def assert_recorded_is_built(config, out: Path, monkeypatch) -> set[str]:
    """Compare the file's settings with what they built, and return the names of those that were compared."""
    attached = []

    def attach(_model, _optimizer, gradients, update, *, grad_bits, save_inputs):
        attached.extend([gradients, update, grad_bits, save_inputs])

    monkeypatch.setattr(galore_torch, "attach", attach)
    run = new_run(Pretraining, config, out)
    assert Pretraining.recorded(RunFolder(out)) == config
    found = {**of_trainer(run), **of_adapters(run), **of_optimizer(run, attached)}
    compared = set()
    for section in dataclasses.asdict(config).values():
        for name, value in section.items():
            effective = has_effect(name, config.optimizer, config.adapter)
            by_adapter = name == "rank" and config.adapter.adapter != "none"  # whose rank adapter_rank is
            if effective and not by_adapter and name not in ELSEWHERE:
                expected = config.optimizer.lr if name == "others_lr" and value is None else value
                assert found[name] == expected, name
                compared.add(name)
    return compared


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.broad("full", "galore", "galore-8bit", "galore-adafactor", "qgalore-per-layer", "relora")
def test_a_method_is_recorded_as_it_was_built(method, by_method, tmp_path, monkeypatch):
    assert_recorded_is_built(by_method(method), tmp_path / "run", monkeypatch)


def all_that_it_takes(make, method) -> dict[str, object]:
    """Another value of each setting, as far as the method takes it beside the others."""
    given = {}
    for name, value in OTHER.items():
        try:
            make(method, **given, **{name: value})
        except ValueError:
            continue
        given[name] = value
    return given


@pytest.mark.slow
def test_every_other_value_is_recorded_as_it_was_built(by_method, tmp_path, monkeypatch):
    compared, changed = set(), set()
    for method in METHODS:
        given = all_that_it_takes(by_method, method)
        now = assert_recorded_is_built(by_method(method, **given), tmp_path / method, monkeypatch)
        compared |= now
        changed |= now & given.keys()
    every = {field.name for section in sections_of(PretrainConfig).values() for field in dataclasses.fields(section)}
    assert compared == every - ELSEWHERE
    assert changed == OTHER.keys()


def test_defaults_are_those_of_the_library():
    config = OptimizerConfig()
    for name, value in PROJECTED_DEFAULTS.items():
        assert getattr(config, name) == value, name


def test_where_torchrun_starts_anew_what_has_ended_the_result_is_told_again(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    given = tmp_path / "given.toml"
    given.write_text(tiny(steps=1).to_toml(), encoding="utf-8")
    asked = ["pretrain", "--config", str(given), "--out", str(tmp_path / "run"), "--json"]
    first, again = (CliRunner().invoke(app(), asked) for _ in range(2))
    assert (first.exit_code, again.exit_code) == (0, 0), again.output
    assert json.loads(again.stdout) == json.loads(first.stdout)
    assert "holds the finished run" in again.stderr
