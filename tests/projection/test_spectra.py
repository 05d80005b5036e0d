"""How much of a gradient lies in how few dimensions: against the SVD in float64, for every rank."""

import pytest
import torch

from galore_torch.projection import Projection, captured_energy, find_basis, overlap
from galore_torch.projection.spectra import Spectrum, gram, rank_that_holds

SHAPES = [(8, 8), (6, 20), (20, 6), (1, 5), (3, 7, 9)]
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def gradient(shape, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_spectrum_is_that_of_the_svd(shape, dtype):
    grad = gradient(shape, dtype)
    values = torch.linalg.svdvals(grad.double())
    spectrum = Spectrum.of(gram(grad))
    torch.testing.assert_close(spectrum.energies, values.square(), atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(spectrum.stable_rank, values.square().sum(-1) / values[..., 0].square(), **EXACT)
    expected = values.square().cumsum(-1) / grad.double().square().sum((-2, -1))[..., None]
    torch.testing.assert_close(spectrum.held, expected, **EXACT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_another_gradient_has_in_the_first_directions_is_what_the_projection_keeps(shape):
    one, other = gradient(shape), gradient(shape, seed=1)
    spectrum = Spectrum.of(gram(one))
    left, _, right = torch.linalg.svd(one, full_matrices=False)
    tall = shape[-2] > shape[-1]
    vectors = right.mT if tall else left
    held = spectrum.holds(gram(other))
    for rank in range(1, min(shape[-2:]) + 1):
        kept = other @ vectors[..., :rank] if tall else vectors[..., :rank].mT @ other
        expected = kept.square().sum((-2, -1)) / other.square().sum((-2, -1))
        torch.testing.assert_close(held[..., rank - 1], expected, **EXACT)
        same = overlap(spectrum.basis(rank), {"left": vectors[..., :rank]})
        torch.testing.assert_close(same, torch.ones((), dtype=torch.float64), **EXACT)
    torch.testing.assert_close(spectrum.holds(gram(one)), spectrum.held, **EXACT)


def test_a_gradient_of_known_rank_lies_in_as_many_directions():
    grad = gradient((24, 5)) @ gradient((5, 40), seed=1)
    spectrum = Spectrum.of(gram(grad))
    assert rank_that_holds(spectrum.held, 1.0) == 5
    assert spectrum.held[3] < 1 - 1e-6


@pytest.mark.parametrize(("share", "rank"), [(0.0, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.9, 3), (1.0, 4)])
def test_the_least_rank_that_holds_a_share(share, rank):
    assert rank_that_holds(torch.tensor([0.5, 0.8, 0.95, 1.0], dtype=torch.float64), share) == rank


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)], ids=str)
def test_captured_energy_is_the_share_of_the_square_that_comes_back(shape, proj_type):
    projection = Projection.of(shape, 3, proj_type)
    basis = find_basis(projection, gradient(shape, seed=1), "svd", seed=0)
    grad = gradient(shape)
    back = projection.project_back(projection.project(grad, basis), basis)
    expected = back.square().sum() / grad.square().sum()
    torch.testing.assert_close(captured_energy(projection, grad, basis), expected, **EXACT)


def test_captured_energy_of_few_bits_is_formed_in_float32():
    projection = Projection.of((64, 64), 8)
    grad = gradient((64, 64), torch.bfloat16) * 1e-3
    basis = find_basis(projection, grad, "svd", seed=0)
    told = captured_energy(projection, grad, basis)
    assert told.dtype == torch.float32
    wide = {name: factor.double() for name, factor in basis.items()}
    assert float(told) == pytest.approx(float(captured_energy(projection, grad.double(), wide)), abs=3e-3)  # bfloat16
