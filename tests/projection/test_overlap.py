"""The overlap of two subspaces: 1 for the same, 0 for random ones, by the principal angles, whatever the bases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from galore_torch.projection import Projection, overlap
from tests.projection.bases import orthonormal, random_basis
from tests.projection.test_properties import projections, seeds

EXACT = {"atol": 1e-10, "rtol": 0}


def turned(basis):
    """The same subspaces under other bases."""
    return {name: factor @ orthonormal(*factor.shape[:-2], *[factor.shape[-1]] * 2) for name, factor in basis.items()}


def with_modes(projection):
    return projection if projection.modes else Projection.of((3, 2), 1)


@given(projections(), seeds)
def test_a_subspace_overlaps_wholly_with_itself_under_whatever_basis(projection, seed):
    torch.manual_seed(seed)
    basis = random_basis(with_modes(projection))
    torch.testing.assert_close(overlap(basis, turned(basis)), torch.ones((), dtype=torch.float64), **EXACT)


@given(projections(), seeds)
def test_it_depends_on_the_subspaces_alone_and_on_neither_first(projection, seed):
    torch.manual_seed(seed)
    new, old = (random_basis(with_modes(projection)) for _ in range(2))
    expected = overlap(new, old)
    assert expected.shape == ()
    assert -1 - 1e-10 <= expected <= 1 + 1e-10
    torch.testing.assert_close(overlap(turned(new), turned(old)), expected, **EXACT)
    torch.testing.assert_close(overlap(old, new), expected, **EXACT)
    flipped = {name: -factor.flip(-1) for name, factor in new.items()}
    torch.testing.assert_close(overlap(flipped, old), expected, **EXACT)


@given(st.integers(2, 12), st.data())
def test_it_is_the_mean_squared_cosine_of_the_principal_angles_corrected_for_chance(size, data):
    rank = data.draw(st.integers(1, size - 1))
    torch.manual_seed(data.draw(seeds))
    new, old = orthonormal(size, rank), orthonormal(size, rank)
    # The angles by their sines, from what of the one subspace lies outside of the other.
    sines = torch.linalg.svdvals(new - old @ (old.mT @ new))
    expected = (1 - sines.square().mean() - rank / size) / (1 - rank / size)
    torch.testing.assert_close(overlap({"left": new}, {"left": old}), expected, **EXACT)


@pytest.mark.parametrize(("size", "rank"), [(8, 1), (12, 4), (12, 11), (64, 16)])
def test_random_subspaces_overlap_by_nothing_on_average(size, rank):
    torch.manual_seed(0)
    many = [{"left": orthonormal(4000, size, rank)} for _ in range(2)]  # a stack: the mean over all of it
    assert abs(float(overlap(*many))) < 0.01


def test_of_modes_and_of_stacked_matrices_it_is_the_mean():
    torch.manual_seed(0)
    pairs = [[{"left": orthonormal(9, 3)} for _ in range(2)] for _ in range(3)]
    each = torch.stack([overlap(*pair) for pair in pairs])
    stacked = [{"left": torch.stack([pair[side]["left"] for pair in pairs])} for side in range(2)]
    torch.testing.assert_close(overlap(*stacked), each.mean(), **EXACT)
    modes = [{f"mode{index}": pair[side]["left"] for index, pair in enumerate(pairs)} for side in range(2)]
    torch.testing.assert_close(overlap(*modes), each.mean(), **EXACT)


def test_one_axis_turned_is_told_by_its_angle():
    axes = torch.eye(10, dtype=torch.float64)
    old = axes[:, :2]
    for angle in (0.0, 0.3, math.pi / 2):
        new = torch.stack((axes[:, 0], math.cos(angle) * axes[:, 1] + math.sin(angle) * axes[:, 5]), dim=1)
        expected = ((1 + math.cos(angle) ** 2) / 2 - 0.2) / 0.8
        assert float(overlap({"right": new}, {"right": old})) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_short_numbers_are_compared_in_float32(dtype):
    torch.manual_seed(0)
    new, old = ({"left": orthonormal(64, 16).to(dtype)} for _ in range(2))
    found = overlap(new, old)
    assert found.dtype == torch.float32
    exact = overlap({"left": new["left"].double()}, {"left": old["left"].double()})
    assert float(found) == pytest.approx(float(exact), abs=1e-6)


def test_a_whole_space_overlaps_wholly():
    assert float(overlap({"left": orthonormal(3, 5, 5)}, {"left": orthonormal(3, 5, 5)})) == 1
