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

from galore_torch import devices

SHIFTS = (1e-4, 1e-5, 2e-7)
"""On the diagonal of each round's Gram matrix, for float32. The last is as large as what rounding makes of it."""

LR_ROUNDS = 6
"""Of the Cholesky LR iteration. docs/decisions.md has what they leave of the energy."""


def above_zero(sizes: Tensor) -> Tensor:
    """Sizes to divide by: the least normal number in the place of zero, so that zeros stay zeros. One operation.

    Args:
        sizes: not negative, of any shape and floating dtype.

    Returns:
        Of the same shape and dtype.
    """
    return sizes.clamp_min(torch.finfo(sizes.dtype).tiny)


def orthonormal(columns_dl: Tensor, *, nearly: bool = False) -> Tensor:
    """Orthonormal columns, of which the first k span what the first k given ones do.

    Args:
        columns_dl: (..., d, l) with l <= d, float32 or float64, on any device.
        nearly: whether columns will do that depend on each other little enough to be multiplied once more: a third of
            the work on a GPU.

    Returns:
        (..., d, l), orthonormal to 3e-6 in float32. Of columns that depend on earlier ones nothing is meant; on a GPU
        columns of zeros stay zeros.

    Example:
        >>> q = orthonormal(torch.randn(8, 3))
        >>> torch.allclose(q.mT @ q, torch.eye(3), atol=1e-5)
        True
    """
    if devices.runs_ahead(columns_dl):
        return cholesky_qr(columns_dl, rounds=1 if nearly else len(SHIFTS))
    q: Tensor = torch.linalg.qr(columns_dl).Q
    return q


def cholesky_qr(columns_dl: Tensor, rounds: int = len(SHIFTS)) -> Tensor:
    """`orthonormal` by products and triangular solves alone.

    Args:
        columns_dl: (..., d, l). Columns may be all but dependent, not exactly so, except for zeros.
        rounds: how many are made.

    Returns:
        (..., d, l).
    """
    finer = torch.finfo(columns_dl.dtype).eps / torch.finfo(torch.float32).eps
    for shift in SHIFTS[:rounds]:
        lengths = torch.linalg.vector_norm(columns_dl, dim=-2, keepdim=True)
        columns_dl = columns_dl / above_zero(lengths)
        gram_ll = columns_dl.mT @ columns_dl
        gram_ll.diagonal(dim1=-2, dim2=-1).add_(shift * finer)
        factor_ll, _ = torch.linalg.cholesky_ex(gram_ll)  # does not read back whether it succeeded
        columns_dl = torch.linalg.solve_triangular(factor_ll.mT, columns_dl, upper=True, left=False)
    return columns_dl


def exact_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition by the QR method. Synchronizes.

    On a GPU torch would take cuSOLVER's Jacobi method: float32 vectors of a large matrix are then orthonormal to no
    more than 1e-2 (an H100, 1024 x 2736).

    Args:
        matrix: (..., m, n), float32 or float64.

    Returns:
        U, S and V^T, of min(m, n) columns and rows, with the signs of LAPACK on a CPU and those of cuSOLVER's `gesvd`
        on a GPU.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False, driver="gesvd" if matrix.is_cuda else None)
    return left, values, right


def eigen(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, where LAPACK's routine for float32 gives up too: on some matrices of many zeros.

    Args:
        symmetric: (..., l, l), float32 or float64.

    Returns:
        (..., l), ascending, and (..., l, l), of its dtype.

    Raises:
        torch.linalg.LinAlgError: it did not converge in float64 either.
    """
    try:
        values, vectors = torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        values, vectors = (found.to(symmetric.dtype) for found in torch.linalg.eigh(symmetric.double()))
    return values, vectors


def leading_directions(basis_dl: Tensor, across_kl: Tensor, power_dl: Tensor, rank: int) -> Tensor:
    """The coordinates, in a basis S, of the leading left singular vectors that A has within its span.

    Args:
        basis_dl: S, (..., d, l), orthonormal.
        across_kl: A^T S, up to a factor.
        power_dl: A A^T S, up to a factor.
        rank: how many.

    Returns:
        (..., l, rank), the strongest first.
    """
    if devices.runs_ahead(basis_dl):
        return leading_by_cholesky(across_kl.mT @ across_kl, rank)
    ritz_ll = basis_dl.mT @ power_dl
    return eigen(ritz_ll + ritz_ll.mT)[1].flip(-1)[..., :rank]


def leading_by_cholesky(gram_ll: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors, nearly, by the Cholesky LR iteration (Rutishauser 1958), which waits for nothing.

    With C = L1 L1^T and L1^T L1 = L2 L2^T, L2^T L2 is Q^T C Q for an orthogonal Q = L1^-T L2: the factor that QR of C
    gives too, so that this is a step of orthogonal iteration, which sorts eigenvectors by their eigenvalues. Squared
    between two rounds, C has eigenvalues twice as far apart and the same eigenvectors.

    Args:
        gram_ll: C, (..., l, l), symmetric and not negative.
        rank: how many.

    Returns:
        (..., l, rank), orthonormal up to some rounding.
    """
    strength_l = gram_ll.diagonal(dim1=-2, dim2=-1)
    order_l = strength_l.argsort(dim=-1, descending=True)
    places_l = torch.arange(order_l.shape[-1], device=order_l.device)
    turned_ll = (places_l.unsqueeze(-1) == order_l.unsqueeze(-2)).to(gram_ll.dtype)
    gram_ll = turned_ll.mT @ gram_ll @ turned_ll
    gram_ll = gram_ll / above_zero(gram_ll[..., :1, :1])
    digits = torch.finfo(gram_ll.dtype)
    least, more = torch.tensor(digits.tiny**0.8, dtype=gram_ll.dtype), 1 + 30 * digits.eps
    for power in range(LR_ROUNDS):
        if power:  # the first is nearly the largest, and never zero: something is added to each
            gram_ll = gram_ll / gram_ll[..., :1, :1]
            gram_ll = gram_ll @ gram_ll
        first_ll = _cholesky(gram_ll, least, more)
        second_ll = _cholesky(first_ll.mT @ first_ll, least, more)
        turned_ll = turned_ll @ torch.linalg.solve_triangular(first_ll.mT, second_ll, upper=True)
        gram_ll = second_ll.mT @ second_ll
    return turned_ll[..., :rank]


def _cholesky(gram_ll: Tensor, least: Tensor, more: float) -> Tensor:
    """The factor of a matrix that is positive but for rounding, of each entry relative to its row and column.

    Its diagonal becomes more * diagonal + least, in one operation.
    """
    diagonal_l = gram_ll.diagonal(dim1=-2, dim2=-1)
    torch.add(least, diagonal_l, alpha=more, out=diagonal_l)
    factor_ll: Tensor = torch.linalg.cholesky_ex(gram_ll).L  # does not read back whether it succeeded
    return factor_ll


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
