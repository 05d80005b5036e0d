"""Every optimizer that the command line names: over which groups, with which learning rates, and that it trains."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from galore_torch import GaLore
from galore_torch.optim import state_bytes
from galore_torch.training.run.optimizers import TrainerOptimizer, build
from galore_torch.training.settings.optimizer import KINDS, NAMES, OptimizerConfig


@pytest.fixture
def model():
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=64,
            use_cache=False,
        )
    )


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_matrices_then_others_and_hold_every_weight_once(model, name):
    groups = build(model, OptimizerConfig(optim=name, rank=4, lr=0.02, others_lr=0.001), seed=0).param_groups
    held = [name for group in groups for name in group["param_names"]]
    assert sorted(held) == sorted(name for name, _ in model.named_parameters())
    matrices, others = groups
    assert len(matrices["params"]) == 2 * 7
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & set(matrices["param_names"])
    assert others["lr"] == 0.001
    assert ("rank" in matrices) is KINDS[name].projected
    assert KINDS[name].projected or not {"update_proj_gap", "scale", "proj_type"} & set(matrices)


@pytest.mark.learning
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.broad("galore-adamw", "qgalore-adamw8bit")
def test_each_learns_and_only_a_projected_one_keeps_little_state(model, name):
    lr = 0.3 if "sgd" in name else 0.01
    config = OptimizerConfig(optim=name, rank=4, update_proj_gap=5, lr=lr, **KINDS[name].defaults)
    optimizer = build(model, config, seed=0)
    assert isinstance(optimizer, GaLore) is KINDS[name].projected
    tokens = torch.arange(64).repeat(2, 1)
    losses = []
    for _ in range(30):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    if KINDS[name].projected:
        plain = "adamw" if "muon" in name else name.removeprefix("galore-")
        full = build(model, OptimizerConfig(optim=plain, lr=lr), seed=0)
        model(input_ids=tokens, labels=tokens).loss.backward()
        full.step()
        if "adafactor" not in name and "sgd" not in name:  # whose full state is smaller than a basis here
            assert state_bytes(optimizer) < state_bytes(full)


@pytest.mark.parametrize("name", [name for name in NAMES if not KINDS[name].projected])
@pytest.mark.filterwarnings("error:no parameter group")
def test_a_full_rank_optimizer_moves_each_weight_inside_the_backward_as_at_the_step(model, name):
    config = OptimizerConfig(optim=name, lr=0.01, others_lr=0.001, weight_decay=0.1)
    inside = dataclasses.replace(config, update="backward")
    tokens = torch.arange(64).repeat(2, 1)
    first = {key: value.clone() for key, value in model.state_dict().items()}
    after = []
    for each in (config, inside):
        model.load_state_dict(first)
        optimizer = TrainerOptimizer()(model, optimizer=build(model, each, seed=0), config=each)
        for _ in range(3):
            model(input_ids=tokens, labels=tokens).loss.backward()
            left = [parameter for parameter in model.parameters() if parameter.grad is not None and each is inside]
            assert not any(type(parameter.grad) is torch.Tensor for parameter in left)
            optimizer.step()
            optimizer.zero_grad()
        after.append({key: value.clone() for key, value in model.state_dict().items()})
    for key, value in after[0].items():
        assert not torch.equal(value, first[key])
        torch.testing.assert_close(after[1][key], value, rtol=1e-3, atol=2e-5)


def test_settings_arrive(model):
    config = OptimizerConfig(
        optim="galore-adamw", rank=5, update_proj_gap=7, scale=0.5, proj_type="left", decomposition="svd",
        stagger=False, cos_threshold=0.3, gamma_proj=3.0, queue_size=4, lr=0.03, beta1=0.8, beta2=0.99,
        eps=1e-6, weight_decay=0.1,
    )  # fmt: skip
    group = build(model, config, seed=3).param_groups[0]
    expected = {
        "rank": 5, "update_proj_gap": 7, "scale": 0.5, "proj_type": "left", "decomposition": "svd", "stagger": False,
        "cos_threshold": 0.3, "gamma_proj": 3.0, "queue_size": 4, "lr": 0.03, "betas": (0.8, 0.99), "eps": 1e-6,
        "weight_decay": 0.1,
    }  # fmt: skip
    assert {key: group[key] for key in expected} == expected


def test_the_registry_tells_projection_by_name():
    assert all(("galore-" in name) is entry.projected for name, entry in KINDS.items())


# Ranks by module -----------------------------------------------------------------------------------------------------


def test_a_module_has_the_rank_of_the_longest_end_of_its_name(model):
    config = OptimizerConfig(rank=4, rank_pattern="proj=3, q_proj=8,mlp.down_proj=16,down_proj=2")
    with pytest.raises(ValueError, match=r"name ends by proj; they are model\.layers"):  # whole parts alone
        build(model, config, seed=0)
    config = OptimizerConfig(rank=4, rank_pattern="q_proj=8, mlp.down_proj=16,down_proj=2")
    groups = build(model, config, seed=0).param_groups
    held = [name for group in groups for name in group["param_names"]]
    assert sorted(held) == sorted(name for name, _ in model.named_parameters())
    ranks = {name: group["rank"] for group in groups for name in group["param_names"] if "rank" in group}
    wanted = {"q_proj": 8, "down_proj": 16}
    assert ranks == {name: wanted.get(name.split(".")[-2], 4) for name in ranks}


@pytest.mark.parametrize("pattern", ["q_proj", "q_proj=", "q_proj=0", "q_proj=8,", "=8", "q_proj=8=9", "q_proj=x"])
def test_what_is_no_list_of_ranks_is_refused(pattern):
    with pytest.raises(ValueError, match=r"rank_pattern = .* give such as q_proj=32"):
        OptimizerConfig(rank_pattern=pattern)
    with pytest.raises(ValueError, match=r"rank_pattern = 'q=4,q=8' has a name twice"):
        OptimizerConfig(rank_pattern="q=4,q=8")
    with pytest.raises(ValueError, match=r"rank_pattern = '' names nothing"):
        OptimizerConfig(rank_pattern="")


def test_ranks_by_module_need_a_projection():
    with pytest.raises(ValueError, match="rank_pattern = 'q_proj=8' has no effect with optim = 'adamw'"):
        OptimizerConfig(optim="adamw", rank_pattern="q_proj=8")


# Others in few bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["galore-adamw", "galore-muon"])
def test_what_is_not_projected_is_moved_by_an_adamw_of_few_bits(model, optim):
    pytest.importorskip("torchao")
    optimizer = build(model, OptimizerConfig(optim=optim, others_bits=4, rank=4), seed=0)
    assert optimizer._rules.fallback.name == "torchao.optim.adam.AdamW4bit"
    assert optimizer._rules.rule.name.startswith("torch.optim")


def test_few_bits_of_others_need_an_optimizer_with_them():
    with pytest.raises(ValueError, match="others_bits = 8 has no effect with optim = 'galore-sgd'"):
        OptimizerConfig(optim="galore-sgd", others_bits=8)
