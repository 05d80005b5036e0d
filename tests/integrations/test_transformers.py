"""Transformers' Trainer, unchanged, and TRL's: the optimizers by their names train, save and resume."""

import importlib.metadata
import re

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from trl import SFTConfig, SFTTrainer

import galore_torch
from galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from galore_torch.integrations.transformers import GaLoreFactory
from galore_torch.projection import turn_offset
from tests.integrations.small_mistral import SEQUENCE, assert_falls, blocks, mistral, text, tokenizer

RECIPES = {"galore_adamw": GaLoreAdamW, "galore_adamw_8bit": GaLoreAdamW8bit, "galore_adafactor": GaLoreAdafactor}
LAYERWISE = {f"{name}_layerwise": recipe for name, recipe in RECIPES.items()}
ATTENTION = [rf"model\.layers\.{layer}\.self_attn\.{side}_proj" for layer in (0, 1) for side in "qkvo"]
MLP = [rf"model\.layers\.{layer}\.mlp\.{side}_proj" for layer in (0, 1) for side in ("gate", "up", "down")]
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
STEPS = 12


def arguments(folder, kind=TrainingArguments, **settings):
    made = {
        "optim_target_modules": ["attn", "mlp"],
        "optim_args": "rank=8,update_proj_gap=5,scale=0.25,proj_type=std",
        "max_steps": STEPS,
        "save_strategy": "no",
        "learning_rate": 0.01,
        "per_device_train_batch_size": 4,
    }
    return kind(output_dir=str(folder), **QUIET, **{**made, **settings})


def trainer(folder, **settings):
    return Trainer(model=mistral(), args=arguments(folder, **settings), train_dataset=blocks())


def losses(of_trainer):
    return [entry["loss"] for entry in of_trainer.state.log_history if "loss" in entry]


def torch_optimizer(of_trainer):
    """The optimizer under Accelerate's."""
    return of_trainer.optimizer.optimizer


def projected(of_trainer):
    """The projected weights' names."""
    groups = torch_optimizer(of_trainer).param_groups
    chosen = {id(weight) for group in groups if "rank" in group for weight in group["params"]}
    return {name for name, weight in of_trainer.model.named_parameters() if id(weight) in chosen}


def test_the_distribution_is_found_by_its_name():
    assert importlib.metadata.version("galore-torch") == galore_torch.__version__


@pytest.mark.parametrize(("name", "recipe"), {**RECIPES, **LAYERWISE}.items())
def test_trainer_finds_the_class_by_its_name(name, recipe, tmp_path):
    cls, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim=name), mistral())
    if name in LAYERWISE:
        assert cls is LayerWiseDummyOptimizer
        assert {type(one) for one in keywords["optimizer_dict"].values()} == {recipe}
    else:
        assert cls is recipe
        assert recipe(**keywords).param_groups[1]["rank"] == 8


@pytest.mark.learning
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.broad("galore_adamw")
def test_trainer_trains_and_resumes_as_if_it_had_never_stopped(name, tmp_path):
    whole = trainer(tmp_path, optim=name, save_strategy="steps", save_steps=7)
    whole.train()
    assert_falls(losses(whole))

    saved = tmp_path / "checkpoint-7"
    checkpoint = torch.load(saved / "optimizer.pt", weights_only=True)
    assert any("basis" in state for state in checkpoint["state"].values())
    resumed = trainer(tmp_path / "again", optim=name)
    resumed.train(resume_from_checkpoint=str(saved))
    assert losses(resumed)[-5:] == losses(whole)[-5:]
    for (parameter, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), parameter


@pytest.mark.learning
@pytest.mark.parametrize("name", LAYERWISE)
@pytest.mark.broad("galore_adamw_layerwise")
def test_trainer_trains_layer_by_layer(name, tmp_path):
    run = trainer(tmp_path, optim=name)
    run.train()
    assert_falls(losses(run))
    one_each = torch_optimizer(run).optimizer_dict
    assert set(one_each) == set(run.model.parameters())
    assert all(parameter.grad is None for parameter in one_each)
    down = run.model.model.layers[0].mlp.down_proj.weight
    assert one_each[down].state[down]["basis"]["left"].shape == (32, 8)
    assert one_each[down].state[down]["renewals"] == 3  # in the steps 0, 5 and 10 of 12
    run.save_model(tmp_path / "model")
    assert torch.equal(type(run.model).from_pretrained(tmp_path / "model").model.layers[0].mlp.down_proj.weight, down)


@pytest.mark.learning
@pytest.mark.parametrize("name", [*RECIPES, *LAYERWISE])
@pytest.mark.broad("galore_adamw")
def test_sft_trainer_trains_on_text(name, tmp_path):
    run = SFTTrainer(
        model=mistral(),
        args=arguments(tmp_path, SFTConfig, optim=name, max_length=SEQUENCE, dataset_text_field="text", max_steps=8),
        train_dataset=text(),
        processing_class=tokenizer(),
    )
    run.train()
    assert_falls(losses(run))


@pytest.mark.learning
@pytest.mark.slow
def test_sft_trainer_takes_the_arguments_of_trainer(tmp_path):
    """The published example's own form: TrainingArguments with a name, the targets and nothing else of ours."""
    args = arguments(tmp_path, optim="galore_adamw", optim_args="rank=16", max_steps=6)
    run = SFTTrainer(model=mistral(), args=args, train_dataset=text(), processing_class=tokenizer())
    run.train()
    assert_falls(losses(run))
    group = torch_optimizer(run).param_groups[1]
    assert [group[key] for key in ("rank", "update_proj_gap", "scale", "proj_type")] == [16, 200, 0.25, "std"]


def test_optim_args_arrive_and_are_followed(tmp_path):
    run = trainer(
        tmp_path, optim="galore_adamw", optim_args="rank=8,update_proj_gap=5,scale=0.25,proj_type=reverse_std"
    )
    run.train()
    plain, group = torch_optimizer(run).param_groups
    assert "rank" not in plain
    assert [group[key] for key in ("rank", "update_proj_gap", "scale", "proj_type")] == [8, 5, 0.25, "reverse_std"]
    count = len(group["params"])
    for index, weight in enumerate(group["params"]):
        state = torch_optimizer(run).state[weight]
        (side,) = state["basis"]
        assert side == ("left" if weight.shape[0] >= weight.shape[1] else "right")
        assert state["basis"][side].shape == (max(weight.shape), 8)
        assert state["inner"]["exp_avg"].numel() == 8 * min(weight.shape)
        assert state["renewals"] == 1 + len(range(turn_offset(index, count, 5), STEPS, 5))


def test_eight_bit_states_have_eight_bits(tmp_path):
    run = trainer(tmp_path, optim="galore_adamw_8bit", max_steps=1)
    run.train()
    state = torch_optimizer(run).state
    assert state[run.model.model.layers[0].mlp.up_proj.weight]["inner"]["state1"].dtype == torch.uint8
    assert state[run.model.model.layers[0].mlp.up_proj.weight]["inner"]["state1"].shape == (512, 8)


@pytest.mark.parametrize(
    ("targets", "patterns"),
    [
        (["attn", "mlp"], ATTENTION + MLP),
        ([r".*\.layers\.0\..*", "q_proj"], [p for p in ATTENTION + MLP if r"\.0\." in p or "q_proj" in p]),
        (r".*self_attn.*", ATTENTION),
        ("all-linear", [*ATTENTION, *MLP, "lm_head"]),
    ],
    ids=["parts", "patterns", "one pattern", "all-linear"],
)
def test_targets_arrive(targets, patterns, tmp_path):
    run = trainer(tmp_path, optim="galore_adamw", optim_target_modules=targets, max_steps=1)
    run.train()
    expected = "|".join(patterns)
    names = [name for name, _ in run.model.named_parameters()]
    assert projected(run) == {name for name in names if re.fullmatch(rf"({expected})\.weight", name)}
    assert len(projected(run)) == len(patterns)


def test_a_proj_type_that_is_none_is_told_before_training(tmp_path):
    run = trainer(tmp_path, optim="galore_adamw", optim_args="rank=8,proj_type=sideways")
    with pytest.raises(ValueError, match="proj_type is 'sideways'; use one of std"):
        run.train()


@pytest.mark.learning
def test_trainer_takes_our_groups_through_its_factory_and_names_layers(tmp_path):
    run = Trainer(
        model=mistral(),
        args=arguments(tmp_path),
        train_dataset=blocks(),
        optimizer_cls_and_kwargs=(GaLoreFactory, {"rank": 8, "update_proj_gap": 5, "lr": 0.01, "weight_decay": 0.1}),
    )
    run.train()
    assert_falls(losses(run))
    group = torch_optimizer(run).param_groups[0]
    assert group["param_names"][0] == "model.layers.0.self_attn.q_proj.weight"
    assert (group["initial_lr"], group["lr"]) == (0.01, 0.0)  # the schedule reached it
