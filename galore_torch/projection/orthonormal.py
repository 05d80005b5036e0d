"""Orthonormal columns: those with the span of given ones, and singular vectors.

Householder QR on a CPU, Cholesky QR on a GPU.

A GPU makes Householder's reflections one after the other; Cholesky QR is three times a product and a triangular solve,
less than half the time there (docs/results.md), and it does not wait for the device. Its error grows with the square
of the condition number, so the first round is of a Gram matrix with a shifted diagonal (Fukaya et al. 2020, arXiv
1809.11085), and columns are scaled to length 1 before each.

Shape suffixes: d x l the columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SHIFTS = (1e-4, 1e-5, 2e-7)
"""On the diagonal of each round's Gram matrix, for float32. The last is as large as what rounding makes of it."""


def orthonormal(columns_dl: Tensor) -> Tensor:
    """Orthonormal columns, of which the first k span what the first k given ones do.

    Args:
        columns_dl: (..., d, l) with l <= d, float32 or float64, on any device.

    Returns:
        (..., d, l), orthonormal to 3e-6 in float32. Of columns that depend on earlier ones nothing is meant; on a GPU
        columns of zeros stay zeros.

    Example:
        >>> q = orthonormal(torch.randn(8, 3))
        >>> torch.allclose(q.mT @ q, torch.eye(3), atol=1e-5)
        True
    """
    if columns_dl.is_cuda:
        return cholesky_qr(columns_dl)
    q: Tensor = torch.linalg.qr(columns_dl).Q
    return q


def cholesky_qr(columns_dl: Tensor) -> Tensor:
    """`orthonormal` by products and triangular solves alone.

    Args:
        columns_dl: (..., d, l). Columns may be all but dependent, not exactly so, except for zeros.

    Returns:
        (..., d, l).
    """
    finer = torch.finfo(columns_dl.dtype).eps / torch.finfo(torch.float32).eps
    for shift in SHIFTS:
        lengths = torch.linalg.vector_norm(columns_dl, dim=-2, keepdim=True)
        columns_dl = columns_dl / torch.where(lengths > 0, lengths, 1)
        gram_ll = columns_dl.mT @ columns_dl
        gram_ll.diagonal(dim1=-2, dim2=-1).add_(shift * finer)
        factor_ll, _ = torch.linalg.cholesky_ex(gram_ll)  # does not read back whether it succeeded
        columns_dl = torch.linalg.solve_triangular(factor_ll.mT, columns_dl, upper=True, left=False)
    return columns_dl


def exact_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin singular value decomposition by the QR method.

    On a GPU torch would take cuSOLVER's Jacobi method: float32 vectors of a large matrix are then orthonormal to no
    more than 1e-2 (an H100, 1024 x 2736).

    Args:
        matrix: (..., m, n), float32 or float64.

    Returns:
        U, S and V^T, with the signs of LAPACK on a CPU and those of cuSOLVER's `gesvd` on a GPU.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False, driver="gesvd" if matrix.is_cuda else None)
    return left, values, right


@contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products in float32, whatever `torch.set_float32_matmul_precision` allows: TF32 has three digits."""
    allowed = torch.get_float32_matmul_precision()
    if allowed == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
