"""What holds for every projection, whatever the shape, the rank, the sides and the layout."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galore_torch.projection import DECOMPOSITIONS, LAYOUTS, PROJ_TYPES, Projection, find_basis
from tests.projection.bases import random_basis

EXACT = {"atol": 1e-10, "rtol": 1e-10}
seeds = st.integers(0, 2**32 - 1)


@st.composite
def projections(draw):
    shape = draw(st.lists(st.integers(1, 12), min_size=2, max_size=4))
    layout = draw(st.sampled_from(LAYOUTS))
    proj_type = "std" if layout == "tucker" and len(shape) > 2 else draw(st.sampled_from(PROJ_TYPES))
    return Projection.of(shape, draw(st.integers(1, 14)), proj_type, layout)


def gradient(projection):
    return torch.randn(projection.shape, dtype=torch.float64)


@given(projections(), seeds)
def test_projecting_is_linear(projection, seed):
    torch.manual_seed(seed)
    basis, one, other = random_basis(projection), gradient(projection), gradient(projection)
    together = projection.project(2 * one - 3 * other, basis)
    apart = 2 * projection.project(one, basis) - 3 * projection.project(other, basis)
    torch.testing.assert_close(together, apart, **EXACT)


@given(projections(), seeds)
def test_a_projected_tensor_comes_back_whole(projection, seed):
    """`project` undoes `project_back`, the norm stays, and so `project_back` of `project` changes nothing twice."""
    torch.manual_seed(seed)
    basis, projected = random_basis(projection), torch.randn(projection.projected_shape, dtype=torch.float64)
    back = projection.project_back(projected, basis)
    assert back.shape == projection.shape
    torch.testing.assert_close(projection.project(back, basis), projected, **EXACT)
    torch.testing.assert_close(back.norm(), projected.norm(), **EXACT)


@given(projections(), seeds)
def test_a_projected_tensor_has_no_more_energy_than_its_gradient(projection, seed):
    torch.manual_seed(seed)
    basis, full = random_basis(projection), gradient(projection)
    projected = projection.project(full, basis)
    assert projected.shape == projection.projected_shape
    assert projected.is_contiguous()
    assert projected.norm() <= full.norm() * (1 + 1e-12)
    missed = full - projection.project_back(projected, basis)  # is orthogonal to what was caught
    torch.testing.assert_close(missed.square().sum() + projected.square().sum(), full.square().sum(), **EXACT)


@given(projections(), seeds)
def test_folding_is_adding_what_is_projected_back(projection, seed):
    torch.manual_seed(seed)
    basis, weight = random_basis(projection), gradient(projection)
    coordinates = torch.randn(projection.projected_shape, dtype=torch.float64)
    expected = 0.9 * weight - 0.2 * projection.project_back(coordinates, basis)
    projection.fold(weight, coordinates, basis, alpha=-0.2, beta=0.9)
    torch.testing.assert_close(weight, expected, **EXACT)


@given(projections())
def test_no_projected_tensor_is_larger_than_its_weight(projection):
    assert math.prod(projection.projected_shape) <= math.prod(projection.shape)


@settings(max_examples=60)
@given(projections(), st.sampled_from(sorted(DECOMPOSITIONS)), seeds)
def test_every_decomposition_finds_orthonormal_factors_of_the_promised_shapes(projection, decomposition, seed):
    torch.manual_seed(seed)
    basis = None
    for _ in range(2):  # the second from the first
        basis = find_basis(projection, gradient(projection), decomposition, seed=0, old=basis)
        assert {name: factor.shape for name, factor in basis.items()} == projection.factor_shapes
        for factor in basis.values():
            gram = factor.mT @ factor
            torch.testing.assert_close(gram, torch.eye(gram.shape[-1], dtype=gram.dtype).expand_as(gram), **EXACT)
