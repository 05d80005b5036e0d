"""The tools of training treat a projected gradient as the tensor it stores; a step reads it as the full one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from galore_torch import GaLoreAdamW, ProjectedGradient
from galore_torch.projection import Projection
from tests.device import accelerator
from tests.optim.projected import KINDS, basis_of, projected
from tests.optim.small import assert_same, distance, gradient, groups, refusing, walk, weights

every_kind = pytest.mark.parametrize("projection", KINDS.values(), ids=KINDS)


def carriers(*kinds: str) -> list[torch.nn.Parameter]:
    """Weights with projected gradients, and one with an ordinary gradient."""
    trained = weights(*(KINDS[kind].shape for kind in kinds), (7,))
    for index, kind in enumerate(kinds):
        trained[index].grad = projected(KINDS[kind], step=index)
    trained[-1].grad = gradient(trained[-1], 9, 0)
    return trained


def projected_grads(trained: list[torch.nn.Parameter]) -> list[Tensor]:
    return [weight.grad.projected if isinstance(weight.grad, ProjectedGradient) else weight.grad for weight in trained]


def twins(trained: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Parameters with the projected tensors as ordinary gradients: what the others must equal."""
    made = [torch.nn.Parameter(torch.zeros_like(own)) for own in projected_grads(trained)]
    for parameter, own in zip(made, projected_grads(trained), strict=True):
        parameter.grad = own.clone()
    return made


def assert_as_projected(trained: list[torch.nn.Parameter], others: list[torch.nn.Parameter]) -> None:
    assert all(isinstance(weight.grad, ProjectedGradient) for weight in trained[:-1])
    assert_same(projected_grads(trained), [parameter.grad for parameter in others])


# Under the tools of training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [True, False, None])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_clips_the_projected_gradient(foreach, max_norm):
    trained = carriers("left", "right", "full", "tucker", "stack")
    others = twins(trained)
    ours = clip_grad_norm_(trained, max_norm, foreach=foreach)
    # Left to choose, torch takes no subclass in one call.
    theirs = clip_grad_norm_(others, max_norm, foreach=bool(foreach))
    assert_same(ours, theirs)
    assert_as_projected(trained, others)
    assert (torch.nn.utils.get_total_norm([weight.grad for weight in trained]) <= max_norm * 1.001).item()


@pytest.mark.parametrize("norm_type", [1.0, 3.0, float("inf")])
@pytest.mark.parametrize("foreach", [True, False])
def test_other_norms_are_those_of_the_gradient_it_stands_for(norm_type, foreach):
    trained = carriers("left", "full")
    full = [weight.grad.to_full() for weight in trained[:-1]] + [trained[-1].grad.clone()]
    before = projected_grads(trained)
    before = [own.clone() for own in before]
    norm = clip_grad_norm_(trained, 0.5, norm_type=norm_type, foreach=foreach)
    torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(full, norm_type))
    for own, old in zip(projected_grads(trained), before, strict=True):
        torch.testing.assert_close(own, old * 0.5 / (norm + 1e-6))


def test_accelerate_clips_the_projected_gradient():
    trained = carriers("left", "right")
    others = twins(trained)
    accelerated = accelerator()
    assert_same(accelerated.clip_grad_norm_(trained, 0.5), accelerated.clip_grad_norm_(others, 0.5))
    assert_as_projected(trained, others)
    message = refusing(lambda: accelerated.clip_grad_value_(trained, 0.1))
    assert "to_full" in message


@pytest.mark.parametrize("spoil", [None, float("inf"), float("nan")])
def test_a_loss_scaler_unscales_the_projected_gradient_and_sees_what_is_not_finite(spoil, device):
    trained = carriers("left", "full", "tucker")
    if spoil is not None:
        trained[1].grad.projected.view(-1)[0] = spoil
    others = twins(trained)
    steps = []
    for parameters in (trained, others):
        scaler = torch.amp.GradScaler(device, init_scale=1024.0)
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        optimizer.register_step_post_hook(lambda *_: steps.append(1))
        scaler.scale(torch.zeros(()))  # makes the scale
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (1024.0 if spoil is None else 512.0)
    assert len(steps) == (2 if spoil is None else 0)
    assert_as_projected(trained, others)
    if spoil is None:
        torch.testing.assert_close(trained[0].grad.projected, projected(KINDS["left"]).projected / 1024)


def test_zero_grad_of_both_kinds():
    trained = carriers("left", "tucker")
    for foreach in (True, False):
        optimizer = torch.optim.SGD(trained, lr=0.1, foreach=foreach)
        trained[0].grad, trained[1].grad = projected(KINDS["left"]), projected(KINDS["tucker"])
        kept = trained[0].grad.projected
        optimizer.zero_grad(set_to_none=False)
        assert trained[0].grad.projected is kept
        assert_same(projected_grads(trained), [torch.zeros_like(own) for own in projected_grads(trained)])
    optimizer.zero_grad()
    assert [weight.grad for weight in trained] == [None, None, None]


@every_kind
def test_autograd_accumulates_into_it(projection):
    (weight,) = weights(projection.shape)
    factors = gradient(weight, 3, 3)
    grad = weight.grad = projected(projection)
    kept, before = grad.projected, grad.projected.clone()
    for _ in range(2):
        (weight * factors).sum().backward()
    assert weight.grad is grad
    assert isinstance(weight.grad, ProjectedGradient)
    assert weight.grad.projected is kept
    torch.testing.assert_close(kept, before + 2 * projection.project(factors, grad.basis))


def test_accumulating_in_the_subspace_is_projecting_the_sum():
    """Projection is linear: micro-batch by micro-batch equals the whole batch."""
    projection = KINDS["right"]
    parts = [gradient(torch.empty(12, 8), step, 0) for step in range(4)]
    total = ProjectedGradient.of(parts[0] / 4, projection, basis_of(projection))
    for part in parts[1:]:
        total.add_(part / 4)
    whole = projection.project(torch.stack(parts).mean(0), total.basis)
    torch.testing.assert_close(total.projected, whole)


# Under the optimizer -------------------------------------------------------------------------------------------------

STEPS_WITH = {
    "left": ((12, 8), {"proj_type": "left"}),
    "right": ((12, 8), {"proj_type": "right"}),
    "full": ((12, 8), {"proj_type": "full"}),
    "stack": ((4, 12, 8), {"proj_type": "left", "layout": "stack"}),
    "reshape": ((8, 6, 3, 3), {"layout": "reshape"}),
    "tucker": ((8, 6, 3, 3), {}),
}


@pytest.mark.parametrize(("shape", "keys"), STEPS_WITH.values(), ids=STEPS_WITH)
def test_a_step_is_the_same_from_it_as_from_the_full_gradient(shape, keys):
    ends = []
    for project in (True, False):
        trained = weights(shape)
        optimizer = GaLoreAdamW(groups(trained, update_proj_gap=100, **keys), lr=0.1, weight_decay=0.1)
        walk(optimizer, trained, [0])
        state = optimizer.state[trained[0]]
        for step in range(1, 4):
            full = gradient(trained[0], step, 0)
            projection = Projection.of(shape, 4, **keys)
            trained[0].grad = ProjectedGradient.of(full, projection, state["basis"]) if project else full
            optimizer.step()
        assert state["step"] == 4
        ends.append(trained[0].detach())
    assert_same(*ends)
    assert distance(ends[:1], weights(shape)) > 0.01


def test_a_step_from_one_of_an_older_basis_projects_it_anew():
    trained = weights((12, 8))
    optimizer = GaLoreAdamW(groups(trained, scale=1.0), lr=0.1)
    walk(optimizer, trained, [0])
    basis = optimizer.state[trained[0]]["basis"]["right"]
    projection = Projection.of((12, 8), 4)
    grad = ProjectedGradient.of(gradient(trained[0], 1, 0), projection, {"right": torch.linalg.qr(torch.randn(8, 4)).Q})
    before = optimizer.state[trained[0]]["inner"]["exp_avg"].clone()
    trained[0].grad = grad
    optimizer.step()
    moved = optimizer.state[trained[0]]["inner"]["exp_avg"]
    torch.testing.assert_close(moved, before.lerp(grad.to_full() @ basis, 0.1))


def test_a_projected_gradient_renews_no_basis():
    """It holds its own subspace alone. The turn stays due until a full gradient comes."""
    trained = weights((12, 8))
    optimizer = GaLoreAdamW(groups(trained, update_proj_gap=1, stagger=False), lr=0.1)
    walk(optimizer, trained, [0])
    state = optimizer.state[trained[0]]
    for step in (1, 2):
        trained[0].grad = ProjectedGradient.of(gradient(trained[0], step, 0), Projection.of((12, 8), 4), state["basis"])
        optimizer.step()
    assert (state["step"], state["renewals"]) == (3, 1)
    walk(optimizer, trained, [3])
    assert (state["step"], state["renewals"], state["renewed_step"]) == (4, 2, 3)
