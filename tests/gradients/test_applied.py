"""Gradients that were applied inside the backward: what stands in their place, and who comes too late for them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from galore_torch import GaLore
from galore_torch.gradients.applied_gradient import AppliedGradient
from tests.device import accelerator
from tests.gradients.llama import BAR, attached, batch, distance, llama, loss_of, walk, weights
from tests.modes import MODES, every_mode
from tests.optim.small import assert_same, refusing, snapshot

IN_BACKWARD = [mode for mode in MODES.values() if mode[1] == "backward"]
every_backward_mode = pytest.mark.parametrize("mode", IN_BACKWARD, ids=" ".join)
one_layer = functools.partial(llama, num_hidden_layers=1)


def unscale(model: nn.Module, optimizer: GaLore) -> None:
    scaler = torch.amp.GradScaler(optimizer.param_groups[0]["params"][0].device.type)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)


TOO_LATE: dict[str, Callable[[nn.Module, GaLore], object]] = {
    "second backward": lambda model, optimizer: loss_of(model, batch(1)).backward(),
    "clipping": lambda model, optimizer: clip_grad_norm_(model.parameters(), 1e-3),
    "clipping one by one": lambda model, optimizer: clip_grad_norm_(model.parameters(), 1e-3, foreach=False),
    "clipping values": lambda model, optimizer: torch.nn.utils.clip_grad_value_(model.parameters(), 1.0),
    "accelerate": lambda model, optimizer: accelerator().clip_grad_norm_(model.parameters(), 1e-3),
    "unscaling": unscale,
}


@every_backward_mode
@pytest.mark.parametrize("action", TOO_LATE.values(), ids=TOO_LATE)
@pytest.mark.broad
def test_who_comes_after_the_gradient_was_applied_is_told(mode, action):
    model, optimizer, _ = attached(mode, one_layer)
    walk(model, optimizer, range(2))
    loss_of(model, batch(2)).backward()
    before = snapshot(optimizer)[:2]
    message = refusing(lambda: action(model, optimizer))
    assert 'update="step"' in message
    assert "weights have moved already" in message
    assert "weight" in message.split("gradient of ")[1].split()[0]  # a parameter's name
    assert_same(snapshot(optimizer)[:2], before)
    optimizer.step()
    optimizer.zero_grad()
    walk(model, optimizer, [3])
    theirs, others_optimizer, _ = attached(mode, one_layer)
    walk(theirs, others_optimizer, range(4))
    assert_same(weights(model), weights(theirs))


@every_backward_mode
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.broad
def test_a_norm_that_clips_nothing_is_that_of_the_gradients(mode, foreach):
    """Trainers show it at every step."""
    model, optimizer, _ = attached(mode, one_layer)
    theirs, other, _ = attached((mode[0], "step"), one_layer)
    for step in range(3):
        norms = []
        for one in (model, theirs):
            loss_of(one, batch(step)).backward()
            norms.append(clip_grad_norm_(one.parameters(), 1e6, foreach=foreach))
        if step or mode[0] == "full":  # at step(), the first gradients of all wait as projected gradients
            torch.testing.assert_close(*norms)
        for one in (optimizer, other):
            one.step()
            one.zero_grad()
    assert distance(model, theirs) <= BAR


@every_backward_mode
@pytest.mark.parametrize("in_place", [True, False])
def test_emptying_gradients_that_were_applied_is_fine(mode, in_place):
    model, optimizer, _ = attached(mode, one_layer)
    loss_of(model, batch(0)).backward()
    assert all(isinstance(weight.grad, AppliedGradient) for weight in model.parameters())
    assert all(isinstance(copy.deepcopy(weight.grad), AppliedGradient) for weight in model.parameters())
    assert "lm_head.weight" in repr(model.lm_head.weight.grad)
    before = weights(model)
    if in_place:
        optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert all(weight.grad is None for weight in model.parameters())
    optimizer.step()
    assert_same(weights(model), before)


@every_mode
def test_a_closure_may_run_the_backward(mode):
    model, optimizer, _ = attached(mode, one_layer)
    losses = []
    for step in range(3):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, batch(step))
            loss.backward()
            return loss

        losses.append(optimizer.step(closure) if step else optimizer.step(closure=closure))
    theirs, other, _ = attached(mode, one_layer)
    walk(theirs, other, range(3))
    assert_same(weights(model), weights(theirs))
    assert all(loss.isfinite() for loss in losses)
