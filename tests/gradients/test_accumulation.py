"""Micro-batches add up to the batch, under every mode that accumulates and under the tools of training."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

from galore_torch import ProjectedGradient
from tests.device import accelerator
from tests.gradients.llama import (
    ACCUMULATING,
    BAR,
    GAP,
    adamw,
    attached,
    batch,
    distance,
    every_accumulating_mode,
    llama,
    loss_of,
    projected_grads,
    projected_weights,
    trained,
    walk,
)

one_layer = functools.partial(llama, num_hidden_layers=1)
PROJECTING = [mode for mode in ACCUMULATING.values() if mode[0] != "full"]
every_projecting_mode = pytest.mark.parametrize("mode", PROJECTING, ids=" ".join)


@every_accumulating_mode
@pytest.mark.broad("fused, at step")
def test_four_micro_batches_of_one_are_a_batch_of_four(mode):
    """After a first step of one batch, so that both start from the same bases."""
    assert distance(trained(mode, micro_batches=4), trained(mode)) <= BAR


@every_projecting_mode
def test_the_first_basis_is_that_of_the_first_micro_batch(mode):
    """It comes with the gradient, and is the weight's once the step is made."""
    first, *others = batch(0).chunk(4)
    model, optimizer, _ = attached(mode, one_layer)
    loss_of(model, first).backward()
    found = [weight.grad.basis for weight in projected_weights(optimizer)]
    assert not optimizer.state
    for ids in others:
        loss_of(model, ids).backward()
    optimizer.step()
    alone = one_layer()
    other = adamw(alone)
    loss_of(alone, first).backward()
    other.step()
    for weight, basis, alike in zip(projected_weights(optimizer), found, projected_weights(other), strict=True):
        (name,) = basis
        assert optimizer.state[weight]["basis"][name] is basis[name]
        torch.testing.assert_close(dict(basis), other.state[alike]["basis"], rtol=0, atol=1e-5)


@every_projecting_mode
@pytest.mark.broad("fused step")
def test_only_layers_whose_turn_it_is_keep_a_full_gradient_through_the_window(mode):
    model, optimizer, _ = attached(mode)
    walk(model, optimizer, [0])
    for step in range(1, 2 * GAP):
        due = [optimizer._trained_weight(weight).needs_renewal for weight in projected_weights(optimizer)]
        for ids in batch(step).chunk(2):
            loss_of(model, ids).backward()
            full = [not isinstance(weight.grad, ProjectedGradient) for weight in projected_weights(optimizer)]
            assert full == due
        assert sum(due) <= 3
        optimizer.step()
        optimizer.zero_grad()


@every_projecting_mode
@pytest.mark.broad("fused step")
def test_bf16_projected_gradients_can_accumulate_in_fp32(mode):
    make = functools.partial(one_layer, torch.bfloat16)
    sums = {}
    for dtype in (None, torch.float32):
        model, optimizer, _ = attached(mode, make, grad_dtype=dtype)
        walk(model, optimizer, [0])
        parts = []
        for ids in batch(1, rows=32).chunk(32):
            loss_of(model, ids).backward()
            parts.append([projected.clone() for projected in projected_grads(optimizer)])
            if dtype is None:  # what a window of one micro-batch holds; its sum is formed here
                model.zero_grad()
        assert {projected.dtype for projected in parts[-1]} == {dtype or torch.bfloat16}
        assert all(
            weight.grad is None or weight.grad.dtype == torch.bfloat16 for weight in projected_weights(optimizer)
        )
        sums[dtype] = parts
    exact = [torch.stack(projected_grads).double().sum(0) for projected_grads in zip(*sums[None], strict=True)]
    for projected, sum_of_parts in zip(sums[torch.float32][-1], exact, strict=True):
        assert (projected.double() - sum_of_parts).norm() <= 1e-5 * sum_of_parts.norm()
    optimizer.step()
    assert all(weight.isfinite().all() for weight in model.parameters())


@every_projecting_mode
@pytest.mark.parametrize("empties", ["optimizer, in place", "model", "model, in place"])
@pytest.mark.broad("optimizer, in place-projected step", "model-fused step")
def test_every_way_to_empty_gradients(mode, empties):
    def trained_with(empty):
        model, optimizer, _ = attached(mode, one_layer)
        for step in range(2 * GAP):
            for ids in batch(step).chunk(2):
                loss_of(model, ids).backward()
            optimizer.step()
            empty(model, optimizer)
        return model

    ways = {
        "optimizer, in place": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
        "model": lambda model, optimizer: model.zero_grad(),
        "model, in place": lambda model, optimizer: model.zero_grad(set_to_none=False),
    }
    ours, theirs = trained_with(ways[empties]), trained_with(lambda model, optimizer: optimizer.zero_grad())
    assert distance(ours, theirs) <= BAR


@every_projecting_mode
def test_an_empty_projected_gradient_of_a_basis_that_was_replaced_takes_up_nothing(mode):
    """Zeroed in place, then a checkpoint is loaded: the old projected gradients' subspace is not the new one."""
    grads = []
    for set_to_none in (True, False):
        other, others_optimizer, _ = attached(mode, one_layer)
        walk(other, others_optimizer, range(3))
        model, optimizer, _ = attached(mode, one_layer)
        loss_of(model, batch(7)).backward()
        optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.load_state_dict(others_optimizer.state_dict())
        model.load_state_dict(other.state_dict())
        loss_of(model, batch(8)).backward()
        grads.append(projected_grads(optimizer))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


# Tools of training ----------------------------------------------------------------------------------------------------


@every_accumulating_mode
@pytest.mark.parametrize("clip", [clip_grad_norm_, lambda *given: accelerator().clip_grad_norm_(*given)])
@pytest.mark.broad
def test_clipping_shows_the_norm_of_what_is_applied(mode, clip):
    model, optimizer, _ = attached(mode, one_layer)
    for step in range(GAP + 2):
        for ids in batch(step).chunk(2):
            loss_of(model, ids).backward()
        grads = [weight.grad for weight in model.parameters()]
        plain = [grad.projected if isinstance(grad, ProjectedGradient) else grad for grad in grads]
        expected = torch.stack([grad.norm() for grad in plain]).norm()
        before = [grad.clone() for grad in plain]
        torch.testing.assert_close(clip(model.parameters(), 0.1), expected)
        torch.testing.assert_close(get_total_norm([weight.grad for weight in model.parameters()]), torch.tensor(0.1))
        torch.testing.assert_close(plain, [grad * 0.1 / expected for grad in before], rtol=1e-5, atol=1e-9)
        optimizer.step()
        optimizer.zero_grad()


@every_accumulating_mode
def test_clipped_training_agrees_among_modes(mode):
    """Full gradients are clipped by the projected gradient's norm here, as the other modes see nothing else."""

    def clipped(one):
        model, optimizer, _ = attached(one, one_layer)
        for step in range(3):
            loss_of(model, batch(step)).backward()
            for weight in projected_weights(optimizer) if one[0] == "full" else ():
                trained = optimizer._trained_weight(weight)
                if not trained.state["renewals"]:
                    trained.renew()
                if not trained.needs_renewal:
                    weight.grad = ProjectedGradient.of(weight.grad, trained.projection, trained.state["basis"])
            clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        return model

    assert distance(clipped(mode), clipped(("full", "step"))) <= BAR


@every_accumulating_mode
@pytest.mark.broad("fused, at step")
def test_a_loss_scaler(mode, device):
    """Scaled by a power of two nothing is rounded otherwise; what overflows moves nothing, and its turns stay due."""
    ours, optimizer, _ = attached(mode, one_layer)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=1000)
    for step in range(GAP + 2):
        if step in (0, 3):  # first a step that overflows
            scaler.scale(loss_of(ours, batch(step)) * float("inf")).backward()
            before = [weight.detach().clone() for weight in ours.parameters()]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), before, strict=True))
        for ids in batch(step).chunk(2):
            scaler.scale(loss_of(ours, ids) / 2).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(ours.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 256.0
    theirs, optimizer, _ = attached(mode, one_layer)
    for step in range(GAP + 2):
        for ids in batch(step).chunk(2):
            (loss_of(theirs, ids) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distance(ours, theirs) <= BAR
