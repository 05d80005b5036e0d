"""A model that has got other parameters than the optimizer holds: told, where torch would train on nothing."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn

from galore_torch import GaLore, param_groups
from galore_torch.gradients import attach
from tests.gradients.llama import adamw, attached, batch, llama, loss_of, walk, weights
from tests.modes import every_mode

one_layer = functools.partial(llama, num_hidden_layers=1)


def assign(model: nn.Module) -> None:
    """Loads a state dict in place of the parameters."""
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)


def new_head(model: nn.Module) -> None:
    """Puts a new head on the model."""
    model.lm_head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False)


def other_dtype(model: nn.Module) -> None:
    """Converts the model where torch makes new parameters for it."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.slow
@every_mode
@pytest.mark.parametrize("replace", [assign, new_head, other_dtype])
def test_weights_that_were_replaced_are_named_and_nothing_is_trained(mode, replace):
    model, optimizer, _ = attached(mode, one_layer)
    walk(model, optimizer, range(2))
    replace(model)
    head = model.lm_head.weight.detach().clone()
    with pytest.raises(ValueError, match=r"optimizer (does not hold|holds).*attach after"):
        walk(model, optimizer, [2])
    assert torch.equal(model.lm_head.weight, head)


@pytest.mark.slow
@every_mode
def test_an_optimizer_of_the_new_weights_takes_the_state_over(mode):
    model, optimizer, handle = attached(mode, one_layer)
    expected, other, _ = attached(mode, one_layer)
    walk(model, optimizer, range(4))
    walk(expected, other, range(8))
    handle.remove()
    assign(model)
    new = adamw(model)
    new.load_state_dict(optimizer.state_dict())
    attach(model, new, *mode)
    walk(model, new, range(4, 8))
    assert all(map(torch.equal, weights(model), weights(expected)))


@every_mode
def test_a_layer_that_is_idle_or_gone_is_no_replaced_weight(mode):
    model, optimizer, _ = attached(mode)
    walk(model, optimizer, range(2))
    skipped = model.model.layers.pop(1)
    before = weights(skipped)
    walk(model, optimizer, range(2, 4))
    assert all(map(torch.equal, weights(skipped), before))
    model.model.layers.append(skipped)
    walk(model, optimizer, range(4, 6))
    assert not any(map(torch.equal, weights(skipped), before))


def test_weights_that_are_replaced_in_the_optimizer_too_are_trained():
    """As Accelerate does it for FSDP2, where a trainer has attached the model before."""
    model, optimizer, _ = attached(("full", "step"), one_layer)
    names = {id(weight): name for name, weight in model.named_parameters()}
    assign(model)
    for group in optimizer.param_groups:
        group["params"] = [model.get_parameter(names[id(weight)]) for weight in group["params"]]
    before = weights(model)
    walk(model, optimizer, range(2))
    assert not any(map(torch.equal, weights(model), before))


def test_steps_without_any_gradient_are_told_when_they_come_one_after_another():
    model = one_layer()
    optimizer = adamw(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # sets up a schedule
        walk(model, optimizer, range(2))
        optimizer.step()
        walk(model, optimizer, range(2, 4))
    assign(model)
    with pytest.warns(UserWarning, match=r"no gradient on any of 12 parameters.*assign=True"):
        walk(model, optimizer, range(4, 6))


@every_mode
def test_steps_that_are_closed_after_the_backward_or_run_a_closure_have_met_gradients(mode):
    model, optimizer, _ = attached(mode, one_layer)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch(0))
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walk(model, optimizer, range(3))
        for _ in range(3):
            optimizer.step(closure)


def test_an_optimizer_without_parameters_that_train_is_left_alone():
    frozen = nn.Linear(8, 8).requires_grad_(False)
    optimizer = GaLore(param_groups(nn.Linear(8, 8), rank=2, target_modules="all-linear"))
    optimizer.param_groups[0]["params"] = [frozen.weight]
    optimizer.param_groups[1:] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.step()
