"""Misuse and mishaps: each is a clear error, and nothing is lost."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from galore_torch import GaLore, GaLoreAdamW, ProjectedGradient, devices, param_groups
from galore_torch.gradients import attach
from galore_torch.gradients.applied_gradient import AppliedGradient
from tests.device import accelerator
from tests.gradients.llama import (
    BAR,
    GAP,
    adamw,
    attached,
    batch,
    distance,
    every_accumulating_mode,
    groups,
    llama,
    loss_of,
    projected_weights,
    walk,
    weights,
)
from tests.gradients.untouched import assert_untouched
from tests.modes import MODES, every_mode
from tests.optim.small import assert_same, refusing

IN_BACKWARD = [mode for mode in MODES.values() if mode[1] == "backward"]
every_backward_mode = pytest.mark.parametrize("mode", IN_BACKWARD, ids=" ".join)
one_layer = functools.partial(llama, num_hidden_layers=1)


class OneCall(torch.optim.Optimizer):
    """Its step divides by how many parameters it moves, so that moving them one by one is something else."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        count = sum(weight.grad is not None for group in self.param_groups for weight in group["params"])
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.add_(weight.grad, alpha=-group["lr"] / count)


# Refused before anything changes ------------------------------------------------------------------------------------


BAD_CHOICES = {
    "an unknown way to form": ({"gradients": "fussed"}, "gradients is 'fussed'; use 'full', 'projected' or 'fused'"),
    "a way to save inputs without fused layers": (
        {"gradients": "projected", "save_inputs": "sampled"},
        "save_inputs is 'sampled'",
    ),
    "an unknown time": ({"update": "later"}, "update is 'later'; use 'step' or 'backward'"),
    "projected gradients that nothing keeps": ({"gradients": "projected", "update": "backward"}, "'full' or 'fused'"),
    "a dtype without projected gradients": (
        {"gradients": "full", "grad_dtype": torch.float32},
        "grad_dtype is torch.float32",
    ),
    "a dtype in the backward": (
        {"gradients": "fused", "update": "backward", "grad_dtype": torch.float32},
        "update='step'",
    ),
}


@pytest.mark.parametrize(("choice", "message"), BAD_CHOICES.values(), ids=BAD_CHOICES)
def test_choices_that_are_unknown_or_exclude_each_other(choice, message):
    model = one_layer()
    optimizer = adamw(model)
    assert message in refusing(lambda: attach(model, optimizer, **choice))
    assert_untouched(model)
    attach(model, optimizer)  # it is not taken for attached


def test_an_optimizer_of_other_weights():
    model = one_layer()
    message = refusing(lambda: attach(model, adamw(one_layer()), "fused"))
    assert "does not hold 12 of the model's 12 trainable parameters (model.embed_tokens.weight" in message
    partly = GaLoreAdamW([group for group in param_groups(model, rank=4) if "rank" in group])
    assert "does not hold 5 of the model's 12" in refusing(lambda: attach(model, partly, "fused"))
    assert_untouched(model)


def test_what_is_no_galore_optimizer():
    model = one_layer()
    wrapped = accelerator().prepare_optimizer(adamw(model))
    for other in (wrapped, torch.optim.AdamW(model.parameters())):
        message = refusing(lambda other=other: attach(model, other))
        assert type(other).__name__ in message
        assert ".optimizer" in message
    attach(model, wrapped.optimizer)


EARLY = [mode for mode in MODES.values() if mode != ("full", "step")]


@pytest.mark.parametrize("second", [GaLoreAdamW, torch.optim.AdamW])
@pytest.mark.parametrize("mode", EARLY, ids=" ".join)
def test_a_second_optimizer_may_not_step_by_the_gradients_of_the_first(mode, second):
    model, optimizer, attachment = attached(mode, one_layer)
    other = second([{**group, "params": list(group["params"])} for group in groups(model)])
    walk(model, optimizer, range(2))
    loss_of(model, batch(2)).backward()
    moved = [weight.detach().clone() for weight in weights(model)]
    said = refusing(other.step)
    assert all(word in said for word in (second.__name__, "q_proj.weight", mode[0], "detach(model)"))
    assert_same(weights(model), moved)
    assert not other.state
    optimizer.step()
    assert "detach(model)" in refusing(lambda: other.step(lambda: loss_of(model, batch(3)).backward()))
    attachment.remove()
    model.zero_grad()
    walk(model, other, range(2, 4))


def test_those_that_wrap_the_first_or_train_other_weights_may():
    model, optimizer, attachment = attached(("projected", "step"), one_layer)

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner, self.param_groups = inner, inner.param_groups

        def step(self, closure=None):
            return self.inner.step(closure)

    class Container(torch.optim.Optimizer):
        def __init__(self, *inside):
            self.optimizers = list(inside)
            super().__init__([weight for one in inside for group in one.param_groups for weight in group["params"]], {})

        def step(self, closure=None):
            for one in self.optimizers:
                one.step(closure)

    walk(model, Wrapper(optimizer), range(2))
    walk(model, Container(optimizer), range(2, 4))
    strangers = [nn.Parameter(torch.ones(4, 4))]
    strangers[0].grad = torch.ones(4, 4)
    torch.optim.SGD(strangers, lr=0.1).step()
    loss_of(model, batch(2)).backward()
    others = [weight for group in optimizer.param_groups if "rank" not in group for weight in group["params"]]
    torch.optim.SGD(others, lr=0.1).step()
    attachment.remove()


def test_an_attached_model_may_be_dropped_while_another_steps():
    """The garbage collector comes when it likes."""
    parts = list(attached(("projected", "step"), one_layer))
    other = [nn.Parameter(torch.ones(2, 2))]
    optimizer = torch.optim.SGD(other, lr=0.1)
    handle = register_optimizer_step_pre_hook(lambda *_: parts.clear() or (gc.collect() and None))
    try:
        optimizer.step()
    finally:
        handle.remove()
    assert not parts


def test_an_optimizer_that_must_move_all_at_once():
    model = one_layer()
    optimizer = GaLore([{"params": list(projected_weights(adamw(model))), "rank": 4}], optimizer_class=OneCall, lr=0.1)
    others = [weight for weight in model.parameters() if weight not in set(projected_weights(optimizer))]
    optimizer.add_param_group({"params": others})
    assert "update='step'" in refusing(lambda: attach(model, optimizer, "full", "backward"))
    assert_untouched(model)


# Layers that are left out, removal, and mishaps ----------------------------------------------------------------------


class Branches(nn.Module):
    """Of two branches a call takes one, or both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp_a, self.mlp_b = nn.Linear(24, 40), nn.Linear(24, 40)

    def forward(self, x, which="ab"):
        return sum(getattr(self, f"mlp_{one}")(x) for one in which)


@every_mode
def test_a_layer_without_a_gradient_in_a_step_waits_and_its_turn_stays_due(mode):
    ends = []
    for one in (mode, None):
        model = Branches()
        optimizer = adamw(model, rank=4)
        if one:
            attach(model, optimizer, *one)
        for step in range(3 * GAP):
            x = torch.randn(5, 24, generator=torch.Generator().manual_seed(step))
            (model(x, "ab" if step % 4 == 0 else "a") - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        state = optimizer.state[model.mlp_b.weight]
        assert state["step"] == 5 < optimizer.state[model.mlp_a.weight]["step"]
        ends.append(model)
    assert distance(*ends) <= BAR


@every_accumulating_mode
def test_removing_in_the_middle_of_a_window_loses_nothing(mode):
    ends = []
    for removes in (True, False):
        model, optimizer, attachment = attached(mode, one_layer)
        walk(model, optimizer, range(2))
        for micro_batch, ids in enumerate(batch(2).chunk(4)):
            loss = loss_of(model, ids)
            if removes and micro_batch == 2:  # between a forward and its backward
                attachment.remove()
                assert_untouched(model)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        walk(model, optimizer, [3])
        ends.append(model)
    assert distance(*ends) <= BAR


@every_backward_mode
def test_a_backward_after_removal_leaves_gradients_to_step(mode):
    ends = []
    for removes in (True, False):
        model, optimizer, attachment = attached(mode, one_layer)
        walk(model, optimizer, range(2))
        loss = loss_of(model, batch(2))
        if removes:
            attachment.remove()
            before = weights(model)
        loss.backward()
        if removes:
            assert_same(weights(model), before)
            assert all(weight.grad is not None for weight in model.parameters())
        optimizer.step()
        ends.append(weights(model))
    assert_same(*ends)


@every_backward_mode
def test_removal_between_backward_and_step(mode):
    model, optimizer, attachment = attached(mode, one_layer)
    loss_of(model, batch(0)).backward()
    before = weights(model)
    attachment.remove()
    optimizer.step()
    assert_same(weights(model), before)
    optimizer.zero_grad()
    walk(model, optimizer, [1])


class MishapError(Exception):
    pass


def breaking(monkeypatch, name: str) -> None:
    """Makes what is done for one weight raise, once."""
    done = []

    def broken(method):
        def wrapper(self, *args):
            if self.name == name and not done:
                done.append(name)
                raise MishapError("out of luck")
            return method(self, *args)

        return wrapper

    from galore_torch.optim.trained_weight import TrainedWeight

    for name_of_way in ("find_basis", "find_unread"):  # the second on a GPU
        monkeypatch.setattr(TrainedWeight, name_of_way, broken(getattr(TrainedWeight, name_of_way)))


@every_mode
def test_a_hook_that_raises_names_its_layer_and_leaves_weights_and_state_consistent(mode, monkeypatch):
    if mode == ("full", "step"):
        return  # it has no hooks
    name = "model.layers.0.mlp.up_proj.weight"
    model, optimizer, _ = attached(mode, one_layer)
    before = weights(model)
    breaking(monkeypatch, name)
    with pytest.raises(RuntimeError, match=rf"{name} inside the backward pass failed: out of luck") as caught:
        loss_of(model, batch(0)).backward()
    assert isinstance(caught.value.__cause__, MishapError)
    weight = dict(model.named_parameters())[name]
    state = optimizer.state.get(weight, {})
    assert "inner" not in state
    assert state.get("step", 0) == state.get("renewals", 0) == 0
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True)]
    counted = [optimizer.state.get(one, {}).get("inner") is not None for one in model.parameters()]
    assert moved == counted  # a weight has moved if and only if its state has
    if mode[1] == "step":
        assert not any(moved)
        optimizer.zero_grad()  # and the step can be made anew
        walk(model, optimizer, range(3))
        theirs, other, _ = attached(mode, one_layer)
        walk(theirs, other, range(3))
        assert distance(model, theirs) <= (BAR if mode[0] == "fused" else 0)
    else:
        assert any(moved)
        assert "have been updated" in str(caught.value)
        assert not isinstance(weight.grad, (AppliedGradient, ProjectedGradient))
        optimizer.step()  # applies what waits
        assert not torch.equal(weight, before[[n for n, _ in model.named_parameters()].index(name)])
        optimizer.zero_grad()
        walk(model, optimizer, range(1, 3))
        assert all(one.isfinite().all() for one in model.parameters())


@every_mode
@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 0.0])
@pytest.mark.broad
def test_a_gradient_that_says_nothing_finds_no_basis(mode, factor):
    model, optimizer, _ = attached(mode, one_layer)
    (loss_of(model, batch(0)) * factor).backward()
    optimizer.subspaces()  # waits for what a GPU tells of renewals
    assert all(optimizer._trained_weight(weight).state["renewals"] == 0 for weight in projected_weights(optimizer))
    early = [weight.grad for weight in model.parameters() if isinstance(weight.grad, ProjectedGradient)]
    assert not any(factor.any() for grad in early for factor in grad.basis.values())
    assert not early or devices.runs_ahead(early[0])  # which projects without asking what the gradient says
