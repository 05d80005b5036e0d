"""What a renewal is made of, in milliseconds, and what could take the place of its factorizations."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.common.memory import clear
from benchmarks.common.timing import timed
from benchmarks.device.session import Figures, Session
from benchmarks.device.sizes import sizes
from benchmarks.device.syncs import waits
from galore_torch.projection import find_bases

OVERSAMPLED = 16
ROUNDS, SHIFT = 3, 1e-4
"""Of the Cholesky QR. The shift holds the first round up where columns are nearly dependent; the others undo it."""


def cholesky_qr(columns_dl: Tensor, rounds: int = ROUNDS, shift: float = SHIFT) -> Tensor:
    """Orthonormal columns by products and Cholesky factors: nothing of it makes the host wait.

    Args:
        columns_dl: (..., d, l), of any scale.
        rounds: How often.
        shift: Added to the diagonal of the first Gram matrix, the columns being of length 1.

    Returns:
        (..., d, l), spanning the same as long as the columns are independent.
    """
    columns_dl = columns_dl / torch.linalg.vector_norm(columns_dl, dim=-2, keepdim=True).clamp_min(1e-30)
    for number in range(rounds):
        gram_ll = columns_dl.mT @ columns_dl
        if number == 0:
            gram_ll.diagonal(dim1=-2, dim2=-1).add_(shift)
        factor_ll, _ = torch.linalg.cholesky_ex(gram_ll)
        columns_dl = torch.linalg.solve_triangular(factor_ll.mT, columns_dl, upper=True, left=False)
    return columns_dl


def measure(session: Session) -> None:
    """Tell the time of each piece on the shapes of the models, and how orthonormal and how good its bases are."""
    for name, size in sizes(session.small).items():
        if name.startswith("tiny"):
            continue  # there is nothing to compute
        for rows, columns in sorted({(min(shape), max(shape)) for shape in size.weights}):
            _pieces(session, f"{name} {rows} x {columns} rank {size.rank}", rows, columns, size.rank)


def _pieces(session: Session, name: str, rows: int, columns: int, rank: int) -> None:
    clear(session.device)
    device, size = session.device, min(rank + OVERSAMPLED, rows)
    # Singular values that fall as those of gradients do.
    fall = torch.arange(1, rows + 1, device=device).pow(-0.7)
    grad = (torch.randn(rows, rows, device=device) * fall) @ torch.randn(rows, columns, device=device)
    grad, start = grad.bfloat16(), torch.randn(rows, size, device=device)
    power = grad.float() @ (grad.float().mT @ start)
    gram = power.mT @ power
    old = find_bases(grad, {"left": rank}, "warm", generator=torch.Generator())
    pieces: dict[str, Callable[[], Tensor]] = {
        "two products in bf16": lambda: grad @ (grad.mT @ start.bfloat16()),
        "Householder QR": lambda: torch.linalg.qr(power).Q,
        "Cholesky QR": lambda: cholesky_qr(power),
        "eigh": lambda: torch.linalg.eigh(gram).eigenvectors,
        "first basis": lambda: find_bases(grad, {"left": rank}, "warm", generator=torch.Generator())["left"],
        "renewed basis": lambda: find_bases(grad, {"left": rank}, "warm", generator=torch.Generator(), old=old)["left"],
        "random basis": lambda: find_bases(grad, {"left": rank}, "random", generator=torch.Generator())["left"],
    }
    if rows <= 1024:
        pieces["svd"] = lambda: find_bases(grad, {"left": rank}, "svd", generator=torch.Generator())["left"]
        stack = power.expand(4, -1, -1).contiguous()
        pieces |= {
            "Householder QR of 4 stacked": lambda: torch.linalg.qr(stack).Q,
            "Cholesky QR of 4 stacked": lambda: cholesky_qr(stack),
            "eigh of 4 stacked": lambda: torch.linalg.eigh(gram.expand(4, -1, -1)).eigenvectors,
        }
    for piece, call in pieces.items():
        session.try_row(f"{name}, {piece}", partial(_figures, session, call, grad), needs_s=2)


def _figures(session: Session, call: Callable[[], Tensor], grad: Tensor) -> Figures:
    figures: Figures = timed(call, session.device, times=3)
    with waits(session.device) as seen:
        found = call()
    figures["waits"] = len(seen)
    if found.dim() == 2 and found.shape[0] == grad.shape[0] and found.dtype == torch.float32:
        identity = torch.eye(found.shape[1], device=found.device)
        figures["from orthonormal"] = float((found.mT @ found - identity).norm())
        image = found.mT @ grad.float()
        figures["energy"] = float((image.norm() / grad.float().norm()).square())
    return figures
