"""Products of bfloat16 matrices on a CPU that has no instructions for them: computed in float32, for all alike.

torch falls back to loops there that take a hundred times as long as its float32 products: no step of a large model
ends. `in_float32` replaces torch's kernels of this process, so that whatever is measured (models, optimizers, peers and
the floor) multiplies in the same way: blocks of both factors are widened, multiplied, and rounded once.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from galore_torch import devices

BLOCK_ELEMENTS = 2**21
"""Of a factor that is widened at a time: enough to keep the cores busy, and next to nothing in memory."""

_installed: list[torch.library.Library] = []


def in_float32() -> bool:
    """Compute this process' products of bfloat16 matrices in float32, if its CPU cannot multiply them itself.

    Returns:
        Whether that is so.
    """
    if not devices.cpu_multiplies_bfloat16() and not _installed:
        _install()
    return not devices.cpu_multiplies_bfloat16()


def as_torch_does() -> None:
    """Compute this process' products as torch does, again."""
    while _installed:
        _installed.pop()._destroy()  # type: ignore[no-untyped-call]


def _install() -> None:
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    kernels: dict[str, Callable[..., Tensor]] = {
        "mm": lambda a, b: _addmm_in_place(a.new_empty(len(a), b.shape[1]), a, b, beta=0),
        "addmm": _addmm,
        "addmm_": _addmm_in_place,
        "bmm": lambda a, b: _baddbmm_in_place(a.new_empty(*a.shape[:2], b.shape[2]), a, b, beta=0),
        "baddbmm_": _baddbmm_in_place,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced is the point
        for name, kernel in kernels.items():
            library.impl(name, kernel, "CPU", allow_override=True)  # type: ignore[no-untyped-call]
    _installed.append(library)


def _addmm_in_place(into: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if any(tensor.dtype != torch.bfloat16 for tensor in (into, a, b)):
        return torch.addmm(into, a, b, beta=beta, alpha=alpha, out=into)
    step = max(BLOCK_ELEMENTS // max(a.shape[1], 1), 16)
    for rows, parts in zip(torch.split(a, step), torch.split(into, step), strict=True):
        wide = rows.float()
        for columns, part in zip(torch.split(b, step, dim=1), torch.split(parts, step, dim=1), strict=True):
            block = torch.mm(wide, columns.float(), out=wide.new_empty(part.shape)).mul_(alpha)
            part.copy_(block.add_(part, alpha=beta) if beta else block)
    return into


def _addmm(added: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    out = added.expand(a.shape[0], b.shape[1]).clone(memory_format=torch.contiguous_format)
    return _addmm_in_place(out, a, b, beta=beta, alpha=alpha)


def _baddbmm_in_place(into: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    for one, left, right in zip(into, a, b, strict=True):
        _addmm_in_place(one, left, right, beta=beta, alpha=alpha)
    return into
