"""What a renewal is made of, in milliseconds: its products and factorizations, and what could take their place."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.common.measuring import clear, timed
from benchmarks.device.session import Figures, Session
from benchmarks.device.waiting import waits
from galore_torch.projection import find_bases
from galore_torch.projection.orthonormal import cholesky_qr, leading_by_cholesky

OVERSAMPLED = 16


def measure(session: Session) -> None:
    """Report the time of each piece on the shapes of the models, and how orthonormal and how good its bases are."""
    for name, size in session.sizes.items():
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

    def basis(how: str, old: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        return find_bases(grad, {"left": rank}, how, seed=0, old=old)

    old = basis("warm")
    pieces: dict[str, Callable[[], Tensor]] = {
        "two products in bf16": lambda: grad @ (grad.mT @ start.bfloat16()),
        "Householder QR": lambda: torch.linalg.qr(power).Q,
        "Cholesky QR": lambda: cholesky_qr(power),
        "eigh": lambda: torch.linalg.eigh(gram).eigenvectors,
        "Cholesky LR": lambda: leading_by_cholesky(gram, rank),
        "first basis": lambda: basis("warm")["left"],
        "renewed basis": lambda: basis("warm", old)["left"],
        "random basis": lambda: basis("random")["left"],
    }
    if rows <= 1024:
        stack = power.expand(4, -1, -1).contiguous()
        pieces |= {
            "svd": lambda: basis("svd")["left"],
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
        figures["energy"] = float(((found.mT @ grad.float()).norm() / grad.float().norm()).square())
    return figures
