"""Fused layers within models as they are: checkpointing, autocast, weights with several uses, copies, and removal."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from galore_torch import GaLore, ProjectedGradient
from galore_torch.gradients import attach
from tests.gradients.llama import (
    BAR,
    GAP,
    adamw,
    attached,
    batch,
    distance,
    llama,
    loss_of,
    projected_grads,
    projected_weights,
    walk,
    weights,
)
from tests.modes import MODES, every_mode
from tests.optim.small import assert_same

FUSED = [mode for mode in MODES.values() if mode[0] == "fused"]
every_fused_mode = pytest.mark.parametrize("mode", FUSED, ids=" ".join)
one_layer = functools.partial(llama, num_hidden_layers=1)


@every_fused_mode
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.broad("True-fused step")
def test_gradient_checkpointing_changes_nothing(mode, reentrant):
    assert_same(checkpointed(mode, reentrant), checkpointed(mode, None))


@functools.cache
def checkpointed(mode: tuple[str, str], reentrant: bool | None) -> list[Tensor]:
    """Weights after some steps with checkpointed activations, of either kind; None is without."""
    model, optimizer, _ = attached(mode)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    walk(model, optimizer, range(GAP + 2), micro_batches=2 if mode[1] == "step" else 1)
    return weights(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_decides_as_the_first_did(reentrant):
    """Attached to a run that has bases already: which layers share an input is learnt in the first forward."""
    ends = []
    for checkpointing in (True, False):
        model = llama()
        optimizer = adamw(model)
        walk(model, optimizer, range(3))
        attach(model, optimizer, "fused")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        walk(model, optimizer, range(3, 6))
        ends.append(weights(model))
    assert_same(*ends)


def test_a_checkpoint_that_is_loaded_between_two_forwards_of_a_step():
    """What was decided for the step no longer holds where the loaded state wants a renewal."""
    model, optimizer, _ = attached(("fused", "step"), one_layer)
    walk(model, optimizer, range(3))
    loss_of(model, batch(3))
    other = one_layer()
    others_optimizer = adamw(other, update_proj_gap=1)  # all renew at every step
    walk(other, others_optimizer, range(3))
    optimizer.load_state_dict(copy.deepcopy(others_optimizer.state_dict()))
    model.load_state_dict(other.state_dict())
    walk(model, optimizer, range(3, 5))
    walk(other, others_optimizer, range(3, 5))
    assert distance(model, other) <= BAR


def test_autocast_computes_as_plain_layers_do(device):
    """Outputs bit for bit; the projected gradients to what bf16 products in another order leave."""
    model, optimizer, _ = attached(("fused", "step"))
    walk(model, optimizer, range(2))
    plain = copy.deepcopy(model)
    with torch.autocast(device, torch.bfloat16):
        ours, theirs = (model(input_ids=batch(2)).logits, plain(input_ids=batch(2)).logits)
        losses = [loss_of(one, batch(2)) for one in (model, plain)]
    assert_same(ours, theirs)
    for loss in losses:
        loss.backward()
    for weight, alike in zip(model.parameters(), plain.parameters(), strict=True):
        assert weight.grad.dtype == alike.grad.dtype == torch.float32
        grad, full = weight.grad, alike.grad
        if isinstance(grad, ProjectedGradient):
            full = ProjectedGradient.of(full, grad.projection, grad.basis).projected
            grad = grad.projected
        assert (grad - full).norm() <= 0.02 * full.norm()
    assert len(projected_grads(optimizer)) > 10
    optimizer.step()


def test_autocast_trains(device):
    ends = []
    for mode in (("fused", "step"), ("full", "step")):
        model, optimizer, _ = attached(mode, one_layer)
        for _ in range(2 * GAP):
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(model, batch(0))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(loss.item())
    assert ends[0] == pytest.approx(ends[1], rel=0.05)  # bf16 products in another order, over two gaps


def test_a_model_without_gradients_computes_as_if_nothing_were_attached():
    model, optimizer, attachment = attached(("fused", "step"))
    walk(model, optimizer, range(2))
    outputs = []
    for _ in range(2):
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                outputs.append(model(input_ids=batch(0)).logits)
        attachment.remove()
    assert not any(output.requires_grad for output in outputs)
    assert_same(outputs[0], outputs[2])
    assert_same(outputs[1].clone(), outputs[3].clone())


# Weights with several uses --------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Two linear layers, and what a subclass does with them besides."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp_in = nn.Linear(24, 40, bias=bias)
        self.mlp_out = nn.Linear(40, 24, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp_out(self.mlp_in(x).tanh())


class UsedElsewhere(Network):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + F.linear(F.linear(x, self.mlp_in.weight).sin(), self.mlp_out.weight)


class UsedElsewhereFirst(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + F.linear(F.linear(x, self.mlp_in.weight).sin(), self.mlp_out.weight))


class Penalized(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.mlp_in.weight.square().mean()


class Tied(Network):
    def __init__(self) -> None:
        super().__init__()
        self.mlp_again = nn.Linear(24, 40)
        self.mlp_again.weight = self.mlp_in.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.mlp_out(self.mlp_again(x.sin()).tanh())


class CalledTwice(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Transposed(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.mlp_in(x) @ self.mlp_in.weight


@functools.cache
def gap_walk(mode, make, optimizer_of=adamw, steps: int = 2 * GAP) -> nn.Module:
    model = make()
    optimizer: GaLore = optimizer_of(model, rank=4)
    attach(model, optimizer, *mode)
    for step in range(steps):
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(step))
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@every_mode
@pytest.mark.parametrize("make", [UsedElsewhere, UsedElsewhereFirst, Penalized, Tied, CalledTwice, Transposed])
@pytest.mark.broad
def test_a_weight_with_several_uses_trains_as_with_full_gradients(mode, make):
    assert distance(gap_walk(mode, make), gap_walk(("full", "step"), make)) <= BAR


@every_fused_mode
@pytest.mark.parametrize("make", [Network, functools.partial(Network, bias=False)])
def test_a_whole_network(mode, make):
    assert distance(gap_walk(mode, make), gap_walk(("full", "step"), make)) <= BAR


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 5, 24), (2, 3, 5, 24)], ids=str)
def test_inputs_of_any_number_of_dimensions(shape):
    grads = []
    for mode in (("fused", "step"), ("projected", "step")):
        model = Network()
        optimizer = adamw(model, rank=4)
        attach(model, optimizer, *mode)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for _ in range(2):
            optimizer.zero_grad()
            x.grad = None
            model(x).square().sum().backward()
        grads.append([x.grad, model.mlp_in.bias.grad, *projected_grads(optimizer)])
    assert len(grads[0]) == 4
    torch.testing.assert_close(*grads)


def test_frozen_parts_get_no_gradient():
    model = Network()
    optimizer = adamw(model, rank=4)
    attach(model, optimizer, "fused")
    model.mlp_in.weight.requires_grad_(False)
    model.mlp_out.bias.requires_grad_(False)
    model(torch.randn(5, 24)).sum().backward()
    present = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert present == {"mlp_in.bias", "mlp_out.weight"}


# Attaching leaves no trace --------------------------------------------------------------------------------------------


def traces(model: nn.Module, optimizer: GaLore) -> dict[str, object]:
    """Everything about a model that attaching could have changed."""
    return {
        "attributes": [set(vars(module)) for module in model.modules()],
        "hooks": [list((weight._backward_hooks or {}).values()) for weight in model.parameters()],
        "after": [list((weight._post_accumulate_grad_hooks or {}).values()) for weight in model.parameters()],
        "optimizer": [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()],
    }


@every_mode
@pytest.mark.broad("fused, at step", "full, in backward")
def test_what_users_see_of_a_model_is_unchanged_and_removing_takes_everything_off(mode):
    model = llama()
    optimizer = adamw(model)
    before = traces(model, optimizer)
    seen = [(name, id(weight), weight.requires_grad, weight.data_ptr()) for name, weight in model.named_parameters()]
    saved = model.state_dict()
    attachment = attach(model, optimizer, *mode)
    assert [(n, id(w), w.requires_grad, w.data_ptr()) for n, w in model.named_parameters()] == seen
    assert_same(model.state_dict(), saved)
    assert list(model.state_dict()) == list(saved)
    assert [type(module) for module in model.modules()] == [type(module) for module in llama().modules()]
    if mode != ("full", "step"):
        assert traces(model, optimizer) != before
    walk(model, optimizer, range(2))
    attachment.remove()
    assert traces(model, optimizer) == before
    attachment.remove()  # once more does nothing
    with attach(model, optimizer, *mode):
        walk(model, optimizer, [2])
    assert traces(model, optimizer) == before
    walk(model, optimizer, [3])


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved_whole(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_mode
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_whole])
@pytest.mark.broad("deepcopy-fused, in backward", "saved_whole-fused, at step", "pickled-projected, at step")
def test_a_copy_is_a_plain_model_that_can_be_attached_itself(mode, copied):
    model, optimizer, attachment = attached(mode, one_layer)
    walk(model, optimizer, range(2))
    twin = copied(model)
    before = weights(model)
    loss_of(twin, batch(2)).backward()
    assert not any(isinstance(weight.grad, ProjectedGradient) for weight in twin.parameters())
    assert all(weight.grad is None for weight in model.parameters())
    assert_same(weights(model), before)
    twin.zero_grad()
    other = adamw(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with attach(twin, other, *mode):
        walk(twin, other, range(2, 4))
    attachment.remove()
    attach(model, optimizer, *mode)
    walk(model, optimizer, range(2, 4))
    assert_same(weights(twin), weights(model))
    assert len(projected_weights(other)) == 7
