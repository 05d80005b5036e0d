"""What the factory takes from a trainer that calls it, and what it and the mixin refuse."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from galore_torch import GaLore
from galore_torch.integrations.transformers import GaLoreFactory, GaLoreTrainerMixin

ARGUMENTS = {
    "learning_rate": 0.3,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 1.0,
}


class Calling:
    """Calls the factory as Trainer does."""

    def __init__(self, **attributes):
        self.args = SimpleNamespace(**ARGUMENTS)
        vars(self).update(attributes)

    def create_optimizer(self, **keywords):
        return GaLoreFactory()(model(), rank=4, **keywords)


def model():
    return nn.ModuleDict({"attn": nn.Linear(16, 16), "mlp": nn.Linear(16, 24)})


def test_what_training_arguments_say_arrives_unless_it_is_given():
    group = Calling().create_optimizer(eps=1e-4).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.3, 0.1, (0.8, 0.95), 1e-4)


def test_a_trainer_that_knows_no_factories_gets_the_optimizer_itself():
    class Older(Calling):
        def create_optimizer(self, **keywords):
            return GaLoreFactory([{"params": []}], rank=4, **keywords)

    (group, *_) = Older(model=model()).create_optimizer(eps=1e-4).param_groups
    assert (group["rank"], group["lr"], group["eps"]) == (4, 0.3, 1e-4)
    with pytest.raises(ValueError, match=r"GaLoreFactory\(\)\(model"):
        GaLoreFactory(model(), rank=4)


def test_the_head_of_a_loss_is_trained_without_projection():
    made = Calling(loss=nn.ModuleDict({"head": nn.Linear(8, 2)})).create_optimizer()
    (group,) = (one for one in made.param_groups if "loss.head.weight" in one["param_names"])
    assert "rank" not in group


def test_a_rate_that_a_search_cannot_change_is_told():
    trainer = Calling(hp_search_backend="any", _trial={"learning_rate": 0.1})
    with pytest.warns(UserWarning, match=r"search over learning_rate has no effect, for lr=0\.2"):
        trainer.create_optimizer(lr=0.2)


def test_any_class_may_run_inside_and_takes_the_training_arguments_that_it_has():
    made = Calling().create_optimizer(
        optimizer=GaLore, optimizer_class=torch.optim.SGD, fallback_class=torch.optim.RMSprop, momentum=0.9
    )
    projected, other = made.param_groups[0], made.param_groups[-1]
    assert (projected["lr"], projected["weight_decay"], projected["momentum"]) == (0.3, 0.1, 0.9)
    assert "betas" not in projected
    assert other["lr"] == 0.3
    assert "alpha" in other


def test_without_a_rate_nothing_is_made():
    with pytest.raises(ValueError, match="got no lr"):
        GaLoreFactory()(model(), rank=4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank": 4, "update_gap": 5}, r"update_gap=5: .*did you mean update_proj_gap\?"),
        ({"ranks": 4}, r"ranks=4: .*did you mean rank\?"),
        ({"rank": 4, "gradient": "fused"}, r"gradient='fused': .*did you mean gradients\?"),
        ({}, r'got no rank; give one, such as \{"rank": 128\}'),
        ({"rank": 4, "optimizer": "adamw"}, "optimizer is a str; pass a recipe itself"),
        ({"rank": 4, "optimizer": torch.optim.AdamW}, "optimizer is AdamW; pass a recipe itself"),
    ],
)
def test_a_wrong_argument_is_told_with_what_there_is(arguments, words):
    with pytest.raises(ValueError, match=words):
        GaLoreFactory()(model(), lr=0.1, **arguments)


def test_a_trainer_before_the_mixin_is_refused():
    with pytest.raises(ValueError, match="names Calling before GaLoreTrainerMixin"):
        type("Wrong", (Calling, GaLoreTrainerMixin), {})
    type("Right", (GaLoreTrainerMixin, Calling), {})


def test_the_next_trainers_optimizer_takes_a_model_over():
    trained = model()
    made = [GaLoreFactory()(trained, rank=4, lr=0.1) for _ in range(2)]
    trained["attn"](torch.ones(2, 16)).sum().backward()
    made[1].step()
    assert trained["attn"].weight in made[1].state
    assert not made[0].state
