"""Tucker bases against tensorly's, and what the layouts find for tensors of more than two dimensions."""

import pytest
import tensorly
import torch
from tensorly.decomposition import tucker

from galore_torch.projection import Projection, find_basis
from galore_torch.projection.orthonormal import exact_svd
from tests.projection.bases import orthonormal

SHAPES = {
    "convolution": (24, 16, 3, 3),
    "one-dimensional convolution": (20, 12, 5),
    "long in all axes": (14, 12, 10),
    "one long axis": (40, 3, 3),
    "narrow": (64, 2, 5),
}
DECOMPOSITIONS = ("svd", "randomized", "warm")


def decaying(shape, exponent):
    """A random tensor whose unfoldings have decaying spectra: a core that falls along each axis, turned."""
    core = torch.randn(shape, dtype=torch.float64)
    for axis, size in enumerate(shape):
        weights = (1 + torch.arange(size, dtype=torch.float64)) ** -exponent
        core = torch.movedim(torch.movedim(core, axis, -1) * weights @ orthonormal(size, size), -1, axis)
    return core


def missed(tensor, approximation):
    return float((tensor - approximation).norm() / tensor.norm())


@pytest.mark.parametrize("exponent", [0.5, 1.5], ids=lambda exponent: f"decay-{exponent}")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.broad
def test_it_misses_no_more_than_tensorly(decomposition, shape, exponent):
    tensor = decaying(shape, exponent)
    projection = Projection.of(shape, 6)
    basis = find_basis(projection, tensor, decomposition, seed=0)
    assert all(factor.shape == projection.factor_shapes[name] for name, factor in basis.items())
    ours = projection.project_back(projection.project(tensor, basis), basis)

    with tensorly.backend_context("pytorch"):
        decomposed = tucker(tensor, rank=list(projection.projected_shape), init="svd", n_iter_max=50)
        theirs = tensorly.tucker_to_tensor(decomposed)
    assert missed(tensor, ours) <= missed(tensor, theirs) * (1 + 1e-3)
    assert missed(tensor, ours) > 0.005  # there was something to miss


@pytest.mark.parametrize("decomposition", [*DECOMPOSITIONS, "random"])
def test_factors_are_orthonormal_and_hold_their_own_elements_alone(decomposition):
    projection = Projection.of((24, 16, 3, 3), 4)
    basis = find_basis(projection, torch.randn(24, 16, 3, 3), decomposition, seed=0)
    assert list(basis) == ["mode0", "mode1"]
    for factor in basis.values():
        torch.testing.assert_close(factor.mT @ factor, torch.eye(4), atol=1e-5, rtol=0)
        assert factor.is_contiguous()
        assert factor.untyped_storage().nbytes() == factor.numel() * 4


def test_the_signs_follow_the_old_factors():
    shape = (24, 16, 3, 3)
    projection = Projection.of(shape, 4)
    tensor = decaying(shape, 1.5)
    first = find_basis(projection, tensor, "warm", seed=0)
    old = {name: -factor for name, factor in first.items()}
    again = find_basis(projection, tensor, "warm", seed=0, old=old)
    for name in again:
        assert ((again[name] * old[name]).sum(0) > 0.99).all()


@pytest.mark.parametrize("decomposition", ["svd", "warm"])
def test_a_stack_finds_each_experts_own_basis(decomposition):
    grad = torch.randn(3, 20, 12, dtype=torch.float64)
    projection = Projection.of(grad.shape, 4, layout="stack")
    basis = find_basis(projection, grad, decomposition, seed=0)["right"]
    for own, matrix in zip(basis, grad, strict=True):
        leading = torch.linalg.svd(matrix).Vh[:4].mT
        captured, best = (float((matrix @ one).square().sum()) for one in (own, leading))
        assert 0.99 * best <= captured <= best * (1 + 1e-9)


def test_reshape_finds_the_basis_of_the_flattened_weight():
    grad = torch.randn(6, 4, 3, 3)
    basis = find_basis(Projection.of(grad.shape, 2, layout="reshape"), grad, "svd", seed=0)
    assert torch.equal(basis["left"], exact_svd(grad.flatten(1))[0][:, :2])
