"""PEFT: a model whose weights adapters have frozen is refused; beside adapters weights are projected, adapters not."""

import re
import warnings

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, TaskType, get_peft_model
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from galore_torch import GaLoreAdamW, attach, param_groups
from galore_torch.integrations.transformers import GaLoreFactory
from tests.integrations.small_mistral import SEQUENCE, assert_falls, blocks, mistral, text, tokenizer

ADAPTERS = {
    "LoRA": lambda: LoraConfig(r=4, target_modules="all-linear"),
    "DoRA": lambda: LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    "attention": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "AdaLoRA": lambda: AdaLoraConfig(
        init_r=4, target_modules=["q_proj"], task_type=TaskType.CAUSAL_LM, total_step=10, tinit=1, tfinal=1
    ),
}
REMEDY = "that an adapter has frozen.*model.unload.*requires_grad.*torch's own optimizer"
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 2}


def adapted(name="LoRA", **more):
    config = ADAPTERS[name]()
    for key, value in more.items():
        setattr(config, key, value)
    return get_peft_model(mistral(), config)


def projected(groups):
    return {name for group in groups if "rank" in group for name in group["param_names"]}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("targets", [("attn", "mlp"), "all-linear"], ids=str)
def test_a_model_that_adapters_have_frozen_is_refused_with_what_to_do(name, targets):
    with pytest.raises(ValueError, match=REMEDY):
        param_groups(adapted(name), 8, targets)


@pytest.mark.parametrize("plain", ["unload", "merge_and_unload"])
def test_the_remedy_helps(plain):
    """What the message names: without adapters every weight is projected and trained again."""
    model = getattr(adapted(), plain)().requires_grad_(True)
    assert projected(param_groups(model, 8)) == projected(param_groups(mistral(), 8))


def test_weights_that_are_trained_beside_adapters_are_projected_and_adapters_are_not():
    model = adapted()
    for name, weight in model.named_parameters():
        if "layers.0" in name:
            weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"not projected: 28 matrices of adapters \(base_model"):
        groups = param_groups(model, 8)
    assert len(projected(groups)) == 7
    assert all(".layers.0." in name and name.endswith("base_layer.weight") for name in projected(groups))
    claimed = sorted(name for group in groups for name in group["param_names"])
    assert claimed == sorted(name for name, weight in model.named_parameters() if weight.requires_grad)


@pytest.mark.learning
@pytest.mark.filterwarnings("ignore:trained, but not projected")
@pytest.mark.parametrize("gradients", ["full", "projected", "fused"])
def test_both_learn(gradients):
    model = adapted()
    weight = model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight").requires_grad_(True)
    adapter = model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight")
    before = [weight.detach().clone(), adapter.detach().clone()]
    optimizer = GaLoreAdamW(param_groups(model, 8, update_proj_gap=2), lr=0.01)
    ids = torch.tensor(blocks()[:4]["input_ids"])
    losses = []
    with attach(model, optimizer, gradients=gradients):
        for _ in range(6):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert_falls(losses, 0.1)
    assert not any(torch.equal(now, old) for now, old in zip((weight, adapter), before, strict=True))
    assert optimizer.state[weight]["inner"]["exp_avg"].shape == (512, 8)
    assert optimizer.state[adapter]["inner"]["exp_avg"].shape == adapter.shape


def test_modules_that_are_trained_whole_are_no_adapters():
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"])
    model = get_peft_model(mistral(), config)
    with pytest.warns(UserWarning, match="4 matrices of adapters"):
        groups = param_groups(model, 8)
    assert len(projected(groups)) == 2
    assert all("down_proj.modules_to_save" in name for name in projected(groups))


def test_adapters_are_projected_where_that_is_asked_for():
    model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = param_groups(model, 2, project_adapters=True)
    assert len(projected(groups)) == 28
    assert all("lora_" in name for name in projected(groups))


def test_trl_is_told_before_it_trains(tmp_path):
    run = SFTTrainer(
        model=mistral(),
        args=SFTConfig(str(tmp_path), max_length=SEQUENCE, **QUIET),
        train_dataset=text(),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
        optimizer_cls_and_kwargs=(GaLoreFactory, {"rank": 8, "lr": 0.01}),
    )
    with pytest.raises(ValueError, match=REMEDY):
        run.train()


def test_trainers_own_names_project_adapters_and_that_is_told(tmp_path):
    """Trainer makes those groups itself: all that can be said is that they save nothing."""
    args = TrainingArguments(
        str(tmp_path), optim="galore_adamw", optim_target_modules=["attn"], optim_args="rank=128", **QUIET
    )
    run = Trainer(model=adapted("attention"), args=args, train_dataset=blocks())
    with pytest.warns(UserWarning, match=re.compile("rank 128 saves no memory")):
        run.train()
