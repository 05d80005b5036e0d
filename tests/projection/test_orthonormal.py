"""Orthonormal columns: the way of a GPU beside the way of a CPU, on any device."""

import pytest
import torch

from galore_torch import devices
from galore_torch.projection import decompositions, find_bases
from galore_torch.projection.orthonormal import cholesky_qr, exact_products, leading_by_cholesky, orthonormal
from tests.projection.bases import energy, with_spectrum

SPECTRA = {
    "flat": torch.ones_like,
    "1/k": lambda k: 1 / (1 + k),
    "1/k^2": lambda k: (1 + k) ** -2.0,
    "1/k^4": lambda k: (1 + k) ** -4.0,
    "rank 10": lambda k: (k < 10).to(k.dtype),
}


@pytest.fixture
def of_a_gpu(monkeypatch):
    """Bases as a GPU finds them."""

    def found(columns, *, nearly=False):
        return cholesky_qr(columns, 1) if nearly else cholesky_qr(columns)

    monkeypatch.setattr(decompositions, "orthonormal", found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(96, 40), (64, 64), (3, 2, 48, 16)], ids=str)
def test_columns_are_those_of_householder(shape, dtype):
    columns = torch.randn(shape, dtype=dtype)
    found, expected = cholesky_qr(columns), torch.linalg.qr(columns).Q
    signs = (found * expected).sum(-2, keepdim=True).sign()
    # The last columns of a square matrix are off by as much as it is ill-conditioned.
    torch.testing.assert_close(found * signs, expected, atol=2e-5 if dtype is torch.float32 else 1e-12, rtol=0)
    torch.testing.assert_close(orthonormal(columns).abs(), expected.abs(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_columns_of_zeros_stay_zeros_and_the_others_are_orthonormal(scale):
    columns = torch.randn(64, 8) * scale
    columns[:, 3:5] = 0
    found = cholesky_qr(columns)
    gram = found.mT @ found
    expected = torch.eye(8)
    expected[3, 3] = expected[4, 4] = 0
    torch.testing.assert_close(gram, expected, atol=3e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())
@pytest.mark.parametrize("decomposition", ["randomized", "warm"])
@pytest.mark.broad
def test_a_basis_holds_the_energy_that_householders_holds(decomposition, spectrum, dtype, of_a_gpu, monkeypatch):
    matrix = with_spectrum(192, 128, spectrum(torch.arange(128.0, dtype=torch.float64))).to(dtype)

    def find():
        old = {"left": torch.linalg.qr(matrix.float() @ torch.randn(128, 24)).Q} if decomposition == "warm" else None
        return find_bases(matrix, {"left": 24}, decomposition, seed=0, old=old)

    torch.manual_seed(0)
    found = find()
    gram = found["left"].double().mT @ found["left"].double()
    told = gram.diagonal() > 0.5
    torch.testing.assert_close(gram, torch.diag(told.double()), atol=3e-6, rtol=0)
    monkeypatch.setattr(decompositions, "orthonormal", orthonormal)
    torch.manual_seed(0)
    assert energy(matrix.double(), found) >= (1 - 1e-4) * energy(matrix.double(), find())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())
@pytest.mark.parametrize("decomposition", ["randomized", "warm"])
def test_a_basis_that_reads_nothing_back_holds_the_energy_of_one_that_does(decomposition, spectrum, dtype, monkeypatch):
    matrix = with_spectrum(192, 128, spectrum(torch.arange(128.0, dtype=torch.float64))).to(dtype)
    old = {"left": torch.linalg.qr(matrix.float() @ torch.randn(128, 24)).Q} if decomposition == "warm" else None
    held = {}
    for ahead in (True, False):
        monkeypatch.setattr(devices, "runs_ahead", lambda _, ahead=ahead: ahead)
        found = find_bases(matrix, {"left": 24}, decomposition, seed=0, old=old)
        gram = found["left"].double().mT @ found["left"].double()
        torch.testing.assert_close(gram, torch.diag((gram.diagonal() > 0.5).double()), atol=3e-6, rtol=0)
        held[ahead] = energy(matrix.double(), found)
    equal = spectrum is SPECTRA["flat"] and dtype is torch.bfloat16  # directions that rounding alone tells apart
    assert held[True] >= (1 - (1e-3 if equal else 1e-4)) * held[False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 40), (3, 2, 24, 24)], ids=str)
def test_leading_eigenvectors_are_found_by_products_and_factors_alone(shape, dtype):
    """In their order, nearly, where each value is 0.8 of the one before."""
    values = 0.8 ** torch.arange(shape[-1], dtype=torch.float64)
    vectors = torch.linalg.qr(torch.randn(shape, dtype=torch.float64)).Q
    gram = vectors * values @ vectors.mT
    found = torch.linalg.qr(leading_by_cholesky(gram.to(dtype), 8).double()).Q
    seen = found.mT @ gram @ found
    strengths = seen.diagonal(dim1=-2, dim2=-1)
    assert (strengths.sum(-1) >= (1 - 1e-4) * values[:8].sum()).all()
    assert (torch.linalg.matrix_norm(seen - torch.diag_embed(strengths)) <= 0.1).all()


def test_products_are_exact_whatever_is_allowed_elsewhere():
    torch.set_float32_matmul_precision("high")
    try:
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
