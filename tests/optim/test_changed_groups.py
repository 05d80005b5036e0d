"""Keys of groups and shapes of weights that are changed between steps: what is wrong is refused before a move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from galore_torch import GaLoreAdamW, GaLoreSGD, attach, param_groups
from tests.modes import every_mode
from tests.optim.small import assert_same, mixed, refusing, snapshot, walk, weights

WRONG: dict[str, Any] = {
    "update_proj_gap": 0,
    "scale": -1.0,
    "stagger": "no",
    "moments": "turn",
    "decomposition": "qr",
    "cos_threshold": 2.0,
    "queue_size": 0,
    "gamma_proj": 1.0,
    "normalize": "rows",
    "residual": "all",
    "residual_scale": "1",
    "basis_group_size": 3,
}


@pytest.mark.parametrize(("key", "value"), WRONG.items(), ids=WRONG)
def test_a_value_that_no_key_may_have_is_refused_at_the_next_step(key: str, value: object):
    trained, made = mixed()
    optimizer = GaLoreAdamW(made, lr=0.01)
    walk(optimizer, trained, range(2))
    optimizer.param_groups[0][key] = value
    before = snapshot(optimizer)
    assert repr(value) in refusing(lambda: walk(optimizer, trained, [2]))
    assert_same(snapshot(optimizer)[:2], before[:2])


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("group", [0, -1])
@pytest.mark.parametrize(
    ("key", "value"), [("lr", "1e-3"), ("weight_decay", "0.1"), ("betas", "0.9"), ("betas", ("0.9", 0.99)), ("eps", -1)]
)
def test_a_hyperparameter_that_cannot_be_right_is_refused_before_a_move(steps, group, key, value):
    trained, made = mixed()
    optimizer = GaLoreAdamW(made, lr=0.01, weight_decay=0.01)
    walk(optimizer, trained, range(steps))
    before = snapshot(optimizer)
    optimizer.param_groups[group][key] = value
    if steps or isinstance(value, str):
        assert f"{key} is {value!r} in a parameter group" in refusing(lambda: walk(optimizer, trained, [steps]))
        assert_same(snapshot(optimizer)[:2], before[:2])
    for changed, usual in (("lr", 0.5), ("lr", torch.tensor(0.5)), ("betas", (0.8, 0.9))):
        optimizer.param_groups[group][key] = optimizer.defaults[key]
        optimizer.param_groups[group][changed] = usual
        walk(optimizer, trained, [steps])


def test_a_key_that_was_taken_away_has_its_default_again():
    trained, made = mixed(scale=0.5)
    optimizer = GaLoreSGD(made, lr=1.0)
    walk(optimizer, trained, range(2))
    del optimizer.param_groups[0]["scale"]
    walk(optimizer, trained, [2])
    assert optimizer.param_groups[0]["scale"] == 0.25


@every_mode
@pytest.mark.parametrize("shape", [(48, 16), (16, 16), (24, 32)])
def test_a_projected_weight_that_was_resized_is_named_with_both_shapes(mode: tuple[str, str], shape: tuple[int, int]):
    model = nn.Sequential(nn.Linear(16, 24))
    optimizer = GaLoreAdamW(param_groups(model, rank=4, target_modules="all-linear"), lr=0.01)
    attach(model, optimizer, *mode)

    def step() -> None:
        model[0](torch.randn(8, model[0].weight.shape[1])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    model[0].weight.data = torch.randn(shape)
    model[0].bias.data = torch.zeros(shape[0])
    message = refusing(step)
    assert message.startswith("0.weight has shape")
    assert f"{shape} now" in message
    assert "(24, 16)" in message


def test_an_expanded_weight_is_refused():
    weight = nn.Parameter(torch.randn(1, 16).expand(24, 16))
    for group in ({"params": [weight], "rank": 4}, {"params": [weight]}):
        assert "(24, 16) is expanded" in refusing(lambda group=group: GaLoreAdamW([group]))


def test_a_weight_of_eight_bits_is_refused():
    weight = nn.Parameter(weights((24, 16))[0].detach().to(torch.float8_e4m3fn))
    assert "float8" in refusing(lambda: GaLoreAdamW([{"params": [weight], "rank": 4}]))
