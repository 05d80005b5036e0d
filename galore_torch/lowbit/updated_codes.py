"""An update of a weight in INT8 in one pass: decode, add, find each group's range, round at random, encode.

One by one in torch these are some twenty passes in float32. A compiler makes a single loop of them, for a CPU or (by
Triton) for a GPU; the very same function, not compiled, is what small weights and systems without a compiler run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from galore_torch.lowbit.codes import symmetric_codes, symmetric_numbers

COMPILED_ELEMENTS = 2**16
"""Weights of at least so many numbers are worth the seconds that compiling takes, once a process."""

MOST_STEPS, MOST_GROUPS = 2, 0.05
"""How far a compiled update may be from the plain one: steps of a code, and in which share of the groups. A compiler
that makes one operation of a product and a sum, or divides by a reciprocal, rounds otherwise where a number lies next
to the border of two codes: in less than a hundredth of the groups."""

UpdateContext = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, "Tensor | None", Tensor], tuple[Tensor, Tensor]]


def updated_codes(
    codes: Tensor, scale: Tensor, update: Tensor, alpha: Tensor, beta: Tensor, key: Tensor | None, first: Tensor
) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit codes of beta * weight + alpha * update.

    Args:
        codes: (groups, group size) uint8.
        scale: (groups,) bfloat16.
        update: (groups, group size), of any floating dtype.
        alpha: factor of the update, of no dimensions.
        beta: factor of the weight, of no dimensions.
        key: of random numbers, int32, of no dimensions; None rounds to the nearest.
        first: place of the first number in the weight, int32, of no dimensions.

    Returns:
        New codes and scales.
    """
    numbers = symmetric_numbers(codes, scale, bits=8) * beta + update.to(torch.float32) * alpha
    return symmetric_codes(numbers, 8, key, first)


_compiled: list[UpdateContext] = []
"""The compiled function, once it has been asked for: importing the compiler takes seconds."""


def fastest(elements: int) -> UpdateContext:
    """The function for a weight of so many numbers.

    Args:
        elements: of the whole weight.

    Returns:
        `updated_codes`, compiled where that pays and works.
    """
    if elements < COMPILED_ELEMENTS or torch.compiler.is_compiling():
        return updated_codes
    if not _compiled:
        _compiled.append(_or_plain(torch.compile(updated_codes, dynamic=True)))
    return _compiled[0]


def _or_plain(compiled: UpdateContext) -> UpdateContext:
    """The compiled function, where it can be compiled and is the plain one but for rounding: compared once a device."""
    compared: set[torch.device] = set()

    def moved(codes: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
        update = others[1]
        for groups in (codes, update):  # of a size that is not known, places would be counted in 64 bits on a GPU
            torch._dynamo.mark_static(groups, 1)
        try:
            made = compiled(codes, *others)  # type: ignore[arg-type]
            if codes.device not in compared:
                plain = updated_codes(codes, *others)  # type: ignore[arg-type]
                if not bool(plain[1].isfinite().all()):
                    return plain  # of such numbers nothing can be told
                _require_rounding_alone(made, plain)
                compared.add(codes.device)
            return made
        except Exception as error:  # whatever a compiler raises; nothing has been written yet
            warnings.warn(
                f"updates of INT8 weights could not be compiled ({type(error).__name__}: {str(error)[:200]}); they are "
                "made in plain torch, many times slower. On a CPU torch.compile needs a C++ compiler",
                stacklevel=2,
            )
            _compiled[:] = [updated_codes]
            return updated_codes(codes, *others)  # type: ignore[arg-type]

    return moved


def _require_rounding_alone(made: tuple[Tensor, Tensor], plain: tuple[Tensor, Tensor]) -> None:
    ours, theirs = (symmetric_numbers(*one, bits=8) for one in (made, plain))
    step = symmetric_numbers(torch.full_like(plain[0][:, :1], 129), plain[1], bits=8)  # 128 is the code of zero
    off = (ours - theirs).abs()
    others = float((off > 0).any(1).to(torch.float32).mean())
    if others > MOST_GROUPS or not bool((off <= MOST_STEPS * step).all()):
        raise ArithmeticError(f"{others:.1%} of the groups come to other numbers")
