"""LLaMA-Factory's calls: three groups and the arguments of the optimizer whose name the user gave."""

import importlib.metadata

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from tests.integrations.small_mistral import assert_falls, blocks, mistral

# What the user calls the optimizer, and the recipe that stands in its place.
NAMES = {
    "adamw_torch": GaLoreAdamW,
    "adamw_bnb_8bit": GaLoreAdamW8bit,
    "adamw_8bit": GaLoreAdamW8bit,
    "paged_adamw_8bit": GaLoreAdamW8bit,
    "adafactor": GaLoreAdafactor,
}
KEYS = {"rank": 8, "update_proj_gap": 3, "scale": 2.0, "proj_type": "std"}
DECAY = 0.1
STEPS = 8
every_name = pytest.mark.parametrize(("name", "recipe"), NAMES.items(), ids=NAMES)


def arguments_of(name, folder):
    """The keywords are those that Transformers has for the name, whatever its version."""
    args = TrainingArguments(
        str(folder), optim=name, learning_rate=0.01, weight_decay=DECAY, use_cpu=True, report_to="none"
    )
    return Trainer.get_optimizer_cls_and_kwargs(args)[1]


def split(model):
    """Projected matrices, other weights that decay, and norms."""
    parts = {"projected": [], "decaying": [], "plain": []}
    for name, weight in model.named_parameters():
        kind = "projected" if "_proj" in name else "plain" if weight.dim() == 1 else "decaying"
        parts[kind].append(weight)
    assert all(parts.values())
    return parts


def train(model, step):
    ids = torch.tensor(blocks()[:8]["input_ids"])
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        step()
        losses.append(loss.item())
    assert_falls(losses)


def test_the_distribution_that_is_asked_for_is_there():
    assert importlib.metadata.version("galore-torch")


@pytest.mark.learning
@every_name
@pytest.mark.broad("adamw_torch", "adamw_8bit")
def test_three_groups_train(name, recipe, tmp_path):
    model, keywords = mistral(), arguments_of(name, tmp_path)
    parts = split(model)
    optimizer = recipe(
        [
            {"params": parts["plain"], "weight_decay": 0.0},
            {"params": parts["decaying"], "weight_decay": DECAY},
            {"params": parts["projected"], "weight_decay": DECAY, **KEYS},
        ],
        **keywords,
    )

    def step():
        optimizer.step()
        optimizer.zero_grad()

    train(model, step)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, DECAY, DECAY]
    assert [group.get("rank") for group in optimizer.param_groups] == [None, None, 8]
    assert all(optimizer.state[weight]["renewals"] >= 2 for weight in parts["projected"])


@pytest.mark.learning
@every_name
@pytest.mark.broad("adamw_8bit")
def test_layer_by_layer_each_weight_has_an_optimizer_and_a_schedule(name, recipe, tmp_path):
    model, keywords = mistral(), arguments_of(name, tmp_path)
    parts = split(model)
    kinds = [("plain", {"weight_decay": 0.0}), ("decaying", {"weight_decay": DECAY})]
    kinds.append(("projected", {"weight_decay": DECAY, **KEYS}))
    one_each = {
        weight: recipe([{"params": [weight], **keys}], **keywords) for kind, keys in kinds for weight in parts[kind]
    }
    schedules = {weight: LambdaLR(one, lambda step: 0.9**step) for weight, one in one_each.items()}

    def apply(weight):
        one_each[weight].step()
        one_each[weight].zero_grad()
        schedules[weight].step()

    for weight in one_each:
        weight.register_post_accumulate_grad_hook(apply)
    train(model, lambda: None)
    assert all(weight.grad is None for weight in one_each)
    for weight in parts["projected"]:
        assert one_each[weight].state[weight]["renewals"] == 3  # in the steps 0, 3 and 6 of 8
        assert one_each[weight].param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**STEPS)


def test_paged_states_are_asked_for_by_name(tmp_path):
    keywords = arguments_of("paged_adamw_8bit", tmp_path)
    assert keywords["is_paged"] is True
    assert keywords["optim_bits"] == 8
    assert "Paged" in repr(GaLoreAdamW8bit(mistral().parameters(), **keywords)._settings["optimizer_class"])
