"""A gradient that is thrown away leaves no trace; where weights have moved by it already, that is told."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from galore_torch import ProjectedGradient, param_groups
from galore_torch.gradients import attach
from galore_torch.optim import GaLoreSGD
from tests.gradients.llama import GAP, attached, batch, every_accumulating_mode, llama, loss_of, walk, weights
from tests.modes import MODES
from tests.optim.small import assert_same, refusing, state_of

IN_BACKWARD = [mode for mode in MODES.values() if mode[1] == "backward"]
every_backward_mode = pytest.mark.parametrize("mode", IN_BACKWARD, ids=" ".join)
one_layer = functools.partial(llama, num_hidden_layers=1)


def part(model: nn.Module) -> list[Tensor]:
    return [weight for name, weight in model.named_parameters() if "q_proj" in name or "norm" in name]


WAYS = {
    "optimizer": lambda model, optimizer, loss: (loss.backward(), optimizer.zero_grad()),
    "optimizer, in place": lambda model, optimizer, loss: (loss.backward(), optimizer.zero_grad(set_to_none=False)),
    "model": lambda model, optimizer, loss: (loss.backward(), model.zero_grad()),
    "autograd.grad": lambda model, optimizer, loss: torch.autograd.grad(loss, part(model)),
    "inputs=": lambda model, optimizer, loss: (loss.backward(inputs=part(model)), model.zero_grad()),
}


@every_accumulating_mode
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("step", [0, 1, GAP])
@pytest.mark.broad
def test_it_is_as_if_it_had_never_been(mode, way, step):
    assert_same(end(mode, way, step), end(mode, None, step))


@functools.cache
def end(mode, way, step):
    """Weights and state after a few steps, before one of which a gradient is thrown away; None throws none away."""
    model, optimizer, _ = attached(mode, one_layer)
    walk(model, optimizer, range(step))
    before = len(optimizer.state)
    if way is not None:
        way(model, optimizer, 1000 * loss_of(model, batch(99)[:1, :4]))
        assert len(optimizer.state) == before
    walk(model, optimizer, range(step, step + 3), micro_batches=2)
    return weights(model), optimizer.state_dict()["state"]


@every_accumulating_mode
def test_an_error_in_the_middle_leaves_nothing_once_gradients_are_emptied(mode):
    def fails(_: Tensor) -> None:
        raise RuntimeError("out of memory")

    ends = []
    for breaks in (False, True):
        model, optimizer, _ = attached(mode)
        if breaks:
            handle = model.model.layers[0].mlp.down_proj.weight.register_hook(fails)
            with pytest.raises(RuntimeError, match="out of memory"):
                loss_of(model, batch(99)).backward()
            handle.remove()
            optimizer.zero_grad()
        walk(model, optimizer, range(3))
        ends.append((weights(model), optimizer.state_dict()["state"]))
    assert_same(*ends)


def test_a_first_window_that_overflows_later_finds_no_basis():
    """The basis of its first micro-batch goes with the step that is not made."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24, bias=False))
    optimizer = GaLoreSGD(param_groups(model, 4, "all-linear"), lr=0.1, skip_nonfinite=True)
    attach(model, optimizer, "projected")
    start = model[0].weight.detach().clone()
    for factor in (1.0, float("inf")):
        (model(torch.randn(8, 16)).square().mean() * factor).backward()
    optimizer.step()
    state = state_of(optimizer, model[0].weight)
    assert (state["renewals"], state["step"], int(state["nonfinite"])) == (0, 0, 1)
    assert_same(model[0].weight.detach(), start)


# Where weights move inside the backward -----------------------------------------------------------------------------


@every_backward_mode
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("through_model", [True, False])
@pytest.mark.broad
def test_a_second_backward_before_step_is_refused_before_anything_moves(mode, in_place, through_model):
    model, optimizer, _ = attached(mode, one_layer)
    walk(model, optimizer, range(2))
    loss_of(model, batch(2)).backward()
    before = weights(model)
    (model if through_model else optimizer).zero_grad(set_to_none=not in_place)
    message = refusing(lambda: loss_of(model, batch(3)).backward())
    assert "update='step'" in message.replace('"', "'")
    assert_same(weights(model), before)
    optimizer.zero_grad()
    optimizer.step()  # closes the step
    walk(model, optimizer, [3])


@every_backward_mode
def test_losses_of_different_weights_may_come_one_after_the_other(mode):
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    optimizer = GaLoreSGD(param_groups(model, 4, "all-linear"), lr=0.1)
    attach(model, optimizer, *mode)
    for step in range(3):
        for part in ("a", "b"):
            model[part](torch.randn(8, 16)).square().mean().backward()
        if step == 1:  # one that reaches both: the first to arrive has not moved yet in this backward
            before = weights(model)
            joint = model["a"](model["b"](torch.randn(8, 16)))
            assert "second" in refusing(joint.sum().backward)
            assert_same(weights(model), before)
            optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()


@every_backward_mode
def test_a_backward_that_ended_in_an_error_is_told_once(mode):
    def fails(_: Tensor) -> None:
        raise RuntimeError("out of memory")

    model, optimizer, attachment = attached(mode)
    handle = model.model.layers[0].mlp.down_proj.weight.register_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss_of(model, batch(0)).backward()
    handle.remove()
    model.zero_grad()
    with pytest.warns(UserWarning, match=r"ended in an error after it had moved \d+ weights") as caught:
        walk(model, optimizer, range(3))
    assert len([one for one in caught if "ended in an error" in str(one.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attachment.remove()


@pytest.mark.parametrize("way", ["then one that ends well", "after one that ended well"])
@every_backward_mode
def test_an_error_before_anything_had_moved_is_no_reason_to_warn(mode, way):
    def fails(_: Tensor) -> None:
        raise RuntimeError("out of memory")

    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(16, 16, bias=False), "b": nn.Linear(16, 16)})
    optimizer = GaLoreSGD(param_groups(model, 4, "all-linear"), lr=0.1)
    attach(model, optimizer, *mode)
    x = torch.randn(8, 16)
    model["b"](model["a"](x)).square().mean().backward()  # all find their bases
    optimizer.step()
    optimizer.zero_grad()
    if way.startswith("after"):
        model["a"](x).square().mean().backward()
    before = weights(model)
    handle = model["b"].weight.register_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        model["b"](x).square().mean().backward()
    handle.remove()
    assert_same(weights(model), before)
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if way.startswith("after"):  # nor may the gradient that has acted be thrown away
            assert "a.weight arrives a second time" in refusing(model["a"](x).square().mean().backward)
        else:
            model["b"](model["a"](x)).square().mean().backward()
        optimizer.step()


class Segments(nn.Module):
    """Re-entrant checkpoints, of which two use one layer."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp_a, self.mlp_b, self.twice = nn.Linear(16, 16), nn.Linear(16, 16), twice

    def forward(self, x: Tensor) -> Tensor:
        x = torch.utils.checkpoint.checkpoint(lambda y: self.mlp_a(y).tanh(), x, use_reentrant=True)
        last = (lambda y: self.mlp_b(self.mlp_a(y))) if self.twice else self.mlp_b
        return torch.utils.checkpoint.checkpoint(last, x, use_reentrant=True)


@pytest.mark.parametrize("twice", [True, False])
@every_backward_mode
def test_a_weight_in_two_reentrant_checkpoints_is_refused(mode, twice):
    model = Segments(twice)
    optimizer = GaLoreSGD(param_groups(model, 4), lr=0.1)
    attach(model, optimizer, *mode)
    for _ in range(2):
        loss = model(torch.randn(8, 16, requires_grad=True)).square().mean()
        if twice:
            assert "update=" in refusing(loss.backward)
            return
        loss.backward()
        optimizer.step()


@every_backward_mode
def test_an_error_around_a_reentrant_checkpoint_that_ended_well_is_told(mode):
    def fails(_: Tensor) -> None:
        raise RuntimeError("out of memory")

    model = Segments(twice=False)
    optimizer = GaLoreSGD(param_groups(model, 4, ["mlp_a"]), lr=0.1)
    head = nn.Linear(16, 16, bias=False)
    optimizer.add_param_group({"params": list(head.parameters())})
    attach(nn.ModuleList([model, head]), optimizer, *mode)
    x = torch.randn(8, 16, requires_grad=True)
    x.register_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        head(model(x)).square().mean().backward()
    with pytest.warns(UserWarning, match="had moved 5 weights"):
        optimizer.step()


# Gradients that are differentiated themselves ----------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [16, 32])
@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
@pytest.mark.parametrize("penalized", ["weights", "input", "accumulated"])
@pytest.mark.parametrize(
    ("gradients", "save_inputs"), [("projected", "projected"), ("fused", "projected"), ("fused", "full")]
)
@pytest.mark.broad
def test_a_penalty_on_gradients_is_exact_or_refused(gradients, save_inputs, penalized, proj_type, hidden):
    def penalty(attaches: bool) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, hidden), nn.Tanh(), nn.Linear(hidden, 16)).double()
        optimizer = GaLoreSGD(param_groups(model, 4, "all-linear", proj_type=proj_type), lr=0.0)
        if attaches:
            attach(model, optimizer, gradients, save_inputs=save_inputs)
        for _ in range(3):
            model(torch.randn(32, 16).double()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        x = torch.randn(8, 16).double().requires_grad_()
        loss, trained = model(x).sin().square().mean(), list(model.parameters())
        if penalized == "accumulated":
            loss.backward(create_graph=True)
            total = sum(weight.grad.square().sum() for weight in trained)
            for weight in trained:
                weight.grad = None
        else:
            of = torch.autograd.grad(loss, trained if penalized == "weights" else x, create_graph=True)
            total = sum(grad.square().sum() for grad in of)
        (loss + 10 * total).backward()
        return total.detach(), [weight.grad for weight in trained]

    exact, expected = penalty(False)
    saves_part = gradients == "fused" and save_inputs == "projected" and proj_type in ("right", "full")
    if saves_part and penalized != "input":
        with pytest.raises(RuntimeError, match="differentiated twice"):
            penalty(True)
        return
    total, grads = penalty(True)
    torch.testing.assert_close(total, exact)
    for grad, full in zip(grads, expected, strict=True):
        if isinstance(grad, ProjectedGradient):
            torch.testing.assert_close(grad.projected, grad.projection.project(full, grad.basis))
        else:
            torch.testing.assert_close(grad, full)


@every_backward_mode
def test_weights_that_move_inside_the_backward_refuse_to_be_differentiated_twice(mode):
    model, _, _ = attached(mode, one_layer)
    before = weights(model)
    assert "twice" in refusing(lambda: loss_of(model, batch(0)).backward(create_graph=True))
    assert_same(weights(model), before)
