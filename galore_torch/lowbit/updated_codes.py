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
    """The compiled function, where it can be compiled and gives what the plain one gives: compared once on a device."""
    compared: set[torch.device] = set()

    def moved(codes: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
        update = others[1]
        for groups in (codes, update):  # of a size that is not known, places would be counted in 64 bits on a GPU
            torch._dynamo.mark_static(groups, 1)
        try:
            made = compiled(codes, *others)  # type: ignore[arg-type]
            if codes.device not in compared:
                plain = updated_codes(codes, *others)  # type: ignore[arg-type]
                if not all(map(torch.equal, made, plain)):
                    raise ArithmeticError("the compiled update is another")
                compared.add(codes.device)
            return made
        except Exception as error:  # whatever a compiler raises; nothing has been written yet
            warnings.warn(
                f"updates of INT8 weights could not be compiled ({type(error).__name__}); they are made in plain "
                "torch, with the same result, many times slower. On a CPU torch.compile needs a C++ compiler",
                stacklevel=2,
            )
            _compiled[:] = [updated_codes]
            return updated_codes(codes, *others)  # type: ignore[arg-type]

    return moved
