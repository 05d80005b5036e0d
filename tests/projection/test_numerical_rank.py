"""Directions that a gradient does not tell: the old basis' stay, or columns of zeros where there is none."""

from statistics import fmean
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galore_torch import devices
from galore_torch.projection import Projection, find_basis, lacking
from galore_torch.projection.numerical_rank import LEAST_SINE, Directions, complete
from tests.projection.bases import orthonormal, random_basis
from tests.projection.test_properties import projections, seeds

TELLING = ("svd", "randomized", "warm")


def find(projection, grad, decomposition, old=None, **keys):
    return find_basis(projection, grad, decomposition, seed=0, old=old, **keys)


def of_rank(shape, rank):
    *stack, rows, columns = shape
    left, right = (torch.randn(*stack, *of, dtype=torch.float64) for of in ((rows, rank), (rank, columns)))
    return left @ right


@settings(max_examples=60)
@given(st.sampled_from(TELLING), st.sampled_from(["left", "right", "full"]), st.integers(0, 8), seeds)
def test_what_a_gradient_tells_is_held_and_what_is_orthogonal_to_it_is_kept(decomposition, proj_type, tokens, seed):
    """The new subspace holds all of the gradient, and those directions of the old one that it says nothing about."""
    torch.manual_seed(seed)
    projection = Projection.of((24, 20), 8, proj_type)
    old, grad = random_basis(projection), of_rank((24, 20), tokens)
    basis = find(projection, grad, decomposition, old)
    assert lacking(basis) == (0, False)
    held = projection.project_back(projection.project(grad, basis), basis)
    torch.testing.assert_close(held, grad, atol=1e-10, rtol=0)
    for name, factor in basis.items():
        torch.testing.assert_close(factor.mT @ factor, torch.eye(8, dtype=factor.dtype), atol=1e-10, rtol=0)
        kept = torch.linalg.svdvals(factor.mT @ old[name])
        assert (kept[: 8 - tokens] > 1 - 1e-9).all()
        if not tokens:
            assert torch.equal(factor, old[name])


@settings(max_examples=40)
@given(projections(), st.sampled_from(TELLING), seeds)
def test_a_gradient_of_one_direction_renews_no_more_than_one_whatever_the_layout(projection, decomposition, seed):
    torch.manual_seed(seed)
    old, grad = random_basis(projection), torch.ones((), dtype=torch.float64)
    for size in projection.view_shape:
        grad = grad.unsqueeze(-1) * torch.randn(size, dtype=torch.float64)
    grad = grad.reshape(projection.shape)
    basis = find(projection, grad, decomposition, old)
    held = projection.project_back(projection.project(grad, basis), basis)
    torch.testing.assert_close(held, grad, atol=1e-10, rtol=1e-10)
    for mode in projection.modes:
        kept = torch.linalg.svdvals(basis[mode.name].mT @ old[mode.name])
        assert (kept[..., : mode.rank - 1] > 1 - 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(64, 64), (300, 40), (40, 300)], ids=str)
@pytest.mark.parametrize("decomposition", TELLING)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2])
@pytest.mark.broad
def test_the_rank_is_seen_through_the_rounding_of_every_dtype(decomposition, shape, dtype, scale):
    torch.manual_seed(0)
    for rank in (1, 3, 12):
        grad = of_rank(shape, rank) * scale
        basis = find(Projection.of(shape, 12), grad.to(dtype), decomposition)
        assert lacking(basis) == (12 - rank, False)


@pytest.mark.parametrize("weak", [3e-3, 1e-3, 3e-4, 1e-4])
@pytest.mark.parametrize("decomposition", TELLING)
def test_weak_directions_beside_strong_ones_are_told_and_nothing_besides(decomposition, weak):
    """Squares of what is weaker than 3e-4 are beyond the digits of float32: an eigenvalue routine mixes directions."""
    torch.manual_seed(0)
    left, right = orthonormal(200, 5), orthonormal(300, 5)
    grad = (left * torch.tensor([1.0, 1.0, 1.0, weak, weak], dtype=torch.float64)) @ right.mT
    for old in (None, {"left": torch.linalg.qr(torch.randn(200, 12)).Q}):
        basis = find(Projection.of((200, 300), 12), grad.float(), decomposition, old)
        assert lacking(basis) == (0 if old else 12 - 5, False)
        if old:
            kept = torch.linalg.svdvals(basis["left"].mT @ old["left"])
            assert (kept[: 12 - 5] > 1 - 1e-4).all()


@pytest.mark.parametrize("decomposition", TELLING)
def test_a_stack_is_filled_up_where_it_lacks_and_nowhere_else(decomposition):
    torch.manual_seed(0)
    projection = Projection.of((4, 24, 20), 6, layout="stack")
    first = of_rank((4, 24, 20), 6)
    first[1] = 0
    first[2] = of_rank((24, 20), 2)
    basis = find(projection, first, decomposition)
    assert lacking(basis) == (6 + 4, True)
    again = of_rank((4, 24, 20), 6)
    again[3] = 0
    filled = find(projection, again, decomposition, basis, fills=True)
    assert lacking(filled) == (0, False)
    same = (filled["right"] == basis["right"]).flatten(1).all(1)
    assert same.tolist() == [True, False, False, True]
    for expert in (1, 2):
        captured = (again[expert] @ filled["right"][expert]).norm() / again[expert].norm()
        assert captured > 1 - 1e-6


def test_a_random_basis_is_whole_whatever_the_gradient():
    projection = Projection.of((3, 24, 20), 6, layout="stack")
    assert lacking(find(projection, torch.zeros(3, 24, 20), "random")) == (0, False)


def test_columns_that_stay_keep_their_place():
    """Where the strongest direction is found again, the others are where they were, so that moments mean the same."""
    torch.manual_seed(0)
    old = orthonormal(30, 5)
    grad = old[:, :1] @ torch.randn(1, 12, dtype=torch.float64)
    basis = find(Projection.of((30, 12), 5, "left"), grad, "warm", {"left": old})["left"]
    torch.testing.assert_close(basis, old, atol=1e-10, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([torch.float32, torch.float64]), st.integers(0, 8), st.integers(0, 8), st.integers(0, 3), seeds)
@pytest.mark.parametrize("ahead", [True, False])
def test_a_basis_is_completed_from_the_old_one(ahead, dtype, told, alike, empty, seed):
    """The determined columns as they are, and as much of the old basis as there is room for, in each matrix."""
    torch.manual_seed(seed)
    rank, alike = 8, min(told, alike)
    old = torch.linalg.qr(torch.randn(3, 40, rank, dtype=dtype)).Q
    mixed = torch.randn(3, 40, rank, dtype=dtype)
    mixed[..., :alike] = old @ torch.randn(3, rank, alike, dtype=dtype)  # a subspace that moves slowly
    old[..., rank - empty :] = 0
    columns = torch.linalg.qr(mixed).Q
    told_r = torch.arange(rank).expand(3, rank).flip(-1) < told
    with mock.patch.object(devices, "runs_ahead", return_value=ahead):
        made = complete(Directions(columns, told_r), old)
    bound = 1e-5 if dtype is torch.float32 else 1e-12
    there = torch.linalg.vector_norm(made, dim=-2) > 0.5
    torch.testing.assert_close(made.mT @ made, torch.diag_embed(there.to(dtype)), atol=bound, rtol=0)
    torch.testing.assert_close(made[..., :told], columns[..., told_r[0]], atol=bound, rtol=0)
    # What the determined columns leave of the old ones, and its strongest directions.
    of_told = columns[..., told_r[0]]
    outside = old - of_told @ (of_told.mT @ old)
    sines = torch.linalg.svdvals(outside)[..., : rank - told]
    assert torch.equal(there.sum(-1), told + (sines > LEAST_SINE).sum(-1))
    most = torch.where(sines > LEAST_SINE, sines, 0).square().sum(-1)
    held = (made[..., told:].mT @ outside).square().sum((-2, -1))
    # Ahead of a device directions of nearly one strength are told apart in part.
    assert (held > (0.9 if ahead else 1 - 1e-5) * most - bound).all(), (held, most)


@pytest.mark.parametrize("told", [2, 5])
def test_rounding_does_not_decide_which_axes_directions_that_stay_have(told):
    """Some of them are all outside of the gradient and as strong as each other: any axes of these would do."""
    torch.manual_seed(0)
    old, columns = torch.linalg.qr(torch.randn(2, 32, 8, dtype=torch.float64)).Q
    told_r = torch.arange(8) < told
    made, again = (
        complete(Directions(columns + noise * torch.randn_like(columns), told_r), old) for noise in (0, 1e-15)
    )
    torch.testing.assert_close(made, again, atol=1e-11, rtol=0)


def test_directions_that_stay_lie_near_the_columns_in_whose_places_they_are():
    """As near as the orthogonal Procrustes problem's solution, on average over subspaces that move little or much."""
    shares = []
    for seed in range(40):
        torch.manual_seed(seed)
        rank, told = 32, 8 * (1 + seed % 3)
        old, columns = torch.linalg.qr(torch.randn(2, 128, rank)).Q
        if seed % 2:
            columns = torch.linalg.qr(old @ torch.randn(rank, rank) + 0.1 * columns).Q
        made = complete(Directions(columns, torch.arange(rank) < told), old)[:, told:]
        nearest = torch.linalg.svdvals(made.mT @ old[:, told:]).sum()
        shares.append(float((made * old[:, told:]).sum() / nearest))
    assert fmean(shares) > 0.99  # without Newton-Schulz steps 0.85
