"""A projected gradient behaves as the tensor that it stores, and as the full gradient that it stands for."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.nn.utils import clip_grad_value_

from galore_torch import ProjectedGradient
from tests.optim.projected import KINDS, basis_of, projected
from tests.optim.small import assert_same, gradient, refusing, weights

every_kind = pytest.mark.parametrize("projection", KINDS.values(), ids=KINDS)


# It is what it stands for --------------------------------------------------------------------------------------------


@every_kind
def test_it_has_the_weights_shape_and_the_projected_tensors_memory(projection):
    grad = projected(projection)
    assert grad.shape == projection.shape
    assert grad.projected.shape == projection.projected_shape
    assert grad.projected.untyped_storage().nbytes() == grad.projected.numel() * 4 < grad.numel() * 4
    weights(projection.shape)[0].grad = grad  # torch checks shape, dtype and device


@every_kind
@pytest.mark.parametrize(
    "read",
    [
        lambda grad: grad.mean(),
        lambda grad: grad.sum(dim=0),
        lambda grad: grad.abs().max(),
        lambda grad: grad.isfinite().all(),
        lambda grad: grad.norm(),
        lambda grad: grad.norm(p=1),
        lambda grad: grad.norm(dim=0),
        lambda grad: torch.linalg.vector_norm(grad, dim=(0, 1)),
        lambda grad: torch.linalg.vector_norm(grad, float("inf")),
        lambda grad: torch.stack(torch._foreach_norm([grad, torch.ones(3)], 2)),
        lambda grad: torch.stack(torch._foreach_norm([grad, torch.ones(3)], 1)),
        lambda grad: grad[0],
        lambda grad: grad.flatten() @ grad.flatten(),
        lambda grad: grad + 1.0,
        lambda grad: 1.0 - grad,
        lambda grad: grad - torch.ones(grad.shape[-1]),
        lambda grad: grad * torch.arange(grad.shape[-1]),
        lambda grad: torch.where(grad > 0, grad, 0.0),
        lambda grad: torch.ones(grad.shape) + grad,
        lambda grad: torch.zeros(grad.shape).copy_(grad),
        lambda grad: torch.cat([grad.detach(), torch.ones(grad.shape)]),
        lambda grad: grad.numel(),
    ],
)
@pytest.mark.broad
def test_reading_it_reads_the_full_gradient(projection, read):
    grad = projected(projection)
    torch.testing.assert_close(as_plain(read(grad)), as_plain(read(grad.to_full())), rtol=1e-5, atol=1e-6)


def as_plain(value: object) -> object:
    return value.to_full() if isinstance(value, ProjectedGradient) else value


@every_kind
def test_what_stays_in_the_subspace_stays_projected(projection):
    grad = projected(projection)
    for result in (2 * grad, grad * torch.tensor(2.0), grad / 0.5, -grad.neg() * 2, grad + grad, grad.add(grad)):
        assert isinstance(result, ProjectedGradient)
        torch.testing.assert_close(result.projected, 2 * grad.projected)
    assert_same((grad - grad).projected, torch.zeros(projection.projected_shape))


@every_kind
def test_a_full_gradient_is_projected_before_it_is_added(projection):
    grad, more = projected(projection), gradient(torch.empty(projection.shape), 5, 5)
    expected = projection.project(grad.to_full() + more, grad.basis)
    torch.testing.assert_close((grad + more).projected, expected)
    torch.testing.assert_close(
        grad.add(more, alpha=-2).projected, grad.projected - 2 * projection.project(more, grad.basis)
    )
    kept = grad.projected
    grad += more
    assert grad.projected is kept
    torch.testing.assert_close(kept, expected)
    grad -= more
    torch.testing.assert_close(kept, projected(projection).projected)


def test_one_of_another_basis_is_turned_into_this_one():
    projection = KINDS["left"]
    one = projected(projection)
    other = ProjectedGradient.of(gradient(torch.empty(12, 8), 5, 5), projection, basis_of(projection, seed=7))
    torch.testing.assert_close((one + other).projected, projection.project(one.to_full() + other.to_full(), one.basis))
    torch.testing.assert_close(other.projected_by(projection, other.basis), other.projected, rtol=0, atol=0)
    assert one.projected_by(projection, dict(one.basis)) is one.projected


@pytest.mark.parametrize(
    "change",
    [
        lambda grad: grad.clamp_(-1, 1),
        lambda grad: grad.fill_(1.0),
        lambda grad: grad.copy_(torch.ones(grad.shape)),
        lambda grad: grad.sign_(),
        lambda grad: setattr(grad, "data", grad.data.clamp(-1, 1)),
        lambda grad: grad.mul_(torch.ones(grad.shape)),
        lambda grad: grad.addcmul_(torch.ones(grad.shape), torch.ones(grad.shape)),
        lambda grad: torch._foreach_clamp_max_([grad], 1.0),
        lambda grad: torch._foreach_mul_([grad], [torch.ones(grad.shape)]),
        lambda grad: torch.abs(torch.ones(grad.shape), out=grad),
        lambda grad: grad.add_(1.0),
        lambda grad: grad.add_(torch.ones(grad.shape[-1])),
        lambda grad: clip_grad_value_([holding(grad)], 0.1, foreach=True),
        lambda grad: clip_grad_value_([holding(grad)], 0.1, foreach=False),
    ],
)
def test_changing_it_beyond_the_subspace_is_refused(change):
    grad = projected(KINDS["right"])
    before = grad.projected.clone()
    message = refusing(lambda: change(grad))
    assert "projected gradient" in message
    assert_same(grad.projected, before)


def holding(grad: ProjectedGradient) -> torch.nn.Parameter:
    (weight,) = weights(grad.shape)
    weight.grad = grad
    return weight


# Copies --------------------------------------------------------------------------------------------------------------


def saved(grad: ProjectedGradient) -> ProjectedGradient:
    buffer = io.BytesIO()
    torch.save(grad, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@every_kind
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda grad: pickle.loads(pickle.dumps(grad)), saved, torch.clone, lambda grad: grad.cpu().clone()],
    ids=["deepcopy", "pickle", "torch.save", "clone", "cpu"],
)
@pytest.mark.broad
def test_a_copy_is_one_of_its_own(projection, copied):
    grad = projected(projection)
    other = copied(grad)
    assert isinstance(other, ProjectedGradient)
    assert_same(other.projected.to(grad.device), grad.projected)
    assert_same(other.to(grad.device).to_full(), grad.to_full())
    other.mul_(2)
    assert_same(grad.projected, projected(projection).projected)


@every_kind
def test_it_changes_its_dtype(projection):
    grad = projected(projection)
    short = grad.to(torch.bfloat16)
    assert short.dtype == short.projected.dtype == torch.bfloat16
    assert_same(short.projected, grad.projected.bfloat16())
    assert short.to_full().dtype == torch.bfloat16
    assert grad.dtype == grad.projected.dtype == torch.float32
    assert short.float().double().projected.dtype == torch.float64
    layer = torch.nn.Linear(8, 12)
    layer.weight.grad = projected(KINDS["left"])
    assert isinstance(layer.bfloat16().weight.grad, ProjectedGradient)
    assert layer.weight.grad.dtype == torch.bfloat16


def test_its_dtype_may_be_longer_than_the_weights():
    """bfloat16 weights, projected gradients that are summed in float32."""
    projection, basis = KINDS["left"], {"left": basis_of(KINDS["left"])["left"].bfloat16()}
    grad = ProjectedGradient(torch.zeros(projection.projected_shape), projection, basis, torch.bfloat16)
    grad.add_(torch.ones(12, 8, dtype=torch.bfloat16))
    assert grad.dtype == torch.bfloat16
    assert grad.projected.dtype == torch.float32
    weights((12, 8), dtype=torch.bfloat16)[0].grad = grad
    assert copy.deepcopy(grad).dtype == torch.bfloat16
