"""Orthonormal columns: the way of a GPU beside the way of a CPU, on any device."""

import pytest
import torch

from galore_torch.projection import decompositions, find_bases
from galore_torch.projection.orthonormal import cholesky_qr, exact_products, orthonormal
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
    monkeypatch.setattr(decompositions, "orthonormal", cholesky_qr)


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
def test_a_basis_holds_the_energy_that_householders_holds(decomposition, spectrum, dtype, of_a_gpu, monkeypatch):
    matrix = with_spectrum(192, 128, spectrum(torch.arange(128.0, dtype=torch.float64))).to(dtype)

    def find():
        old = {"left": torch.linalg.qr(matrix.float() @ torch.randn(128, 24)).Q} if decomposition == "warm" else None
        return find_bases(matrix, {"left": 24}, decomposition, generator=torch.Generator().manual_seed(0), old=old)

    torch.manual_seed(0)
    found = find()
    gram = found["left"].mT @ found["left"]
    told = gram.diagonal() > 0.5
    torch.testing.assert_close(gram, torch.diag(told.float()), atol=3e-6, rtol=0)
    monkeypatch.setattr(decompositions, "orthonormal", orthonormal)
    torch.manual_seed(0)
    assert energy(matrix.double(), found) >= (1 - 1e-4) * energy(matrix.double(), find())


def test_products_are_exact_whatever_is_allowed_elsewhere():
    torch.set_float32_matmul_precision("high")
    try:
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
