"""Adding small updates to weights of 16 bits, without losing what is less than half of their last digit.

bfloat16 has eight significant bits: at 1.0 the next number is 1.0078, so that an update of 0.003 changes nothing,
however often it is made. Stochastic rounding goes up or down at random, such that the mean is right (Zamirai et al.,
arXiv 2010.06192). Compensation keeps what rounding has cut off, in 16 bits more (Kahan 1965).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from galore_torch import devices
from galore_torch.random_bits import random_bits, uniform

Rounding = Literal["nearest", "stochastic", "compensated"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic", "compensated")
"""How an update is rounded into a weight of 16 bits."""

BLOCK_ELEMENTS = 2**20
"""Numbers that are rounded together on a CPU, about."""


def add_rounded(
    weight: Tensor,
    update: Callable[[slice], Tensor],
    *,
    alpha: float = 1.0,
    beta: float | Tensor = 1.0,
    key: int | None = None,
    compensation: Tensor | None = None,
    first: int = 0,
) -> None:
    """In place: weight <- beta * weight + alpha * update, formed in float32 some rows at a time.

    Args:
        weight: of 16 bits, any shape.
        update: gives these rows of the update, of any floating dtype; all of it where the weight has no dimensions.
        alpha: factor of the update.
        beta: factor of the weight, where decay goes.
        key: of the random bits that round it, see `key_of`; to the nearest when None.
        compensation: of the weight's shape and dtype, changed in place: what was cut off so far, which counts as part
            of the weight.
        first: the place of the first number, if they are a part of more.

    Example:
        >>> weight, kept = torch.ones(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bfloat16)
        >>> for _ in range(32):
        ...     add_rounded(weight, lambda rows: torch.full((4,), 2**-10)[rows], compensation=kept)
        >>> weight.tolist()
        [1.03125, 1.03125, 1.03125, 1.03125]
    """
    if weight.dim() == 0:
        weight = weight.unsqueeze(0)
        compensation = None if compensation is None else compensation.unsqueeze(0)
    width = math.prod(weight.shape[1:])
    # formed for each: its exact value, its exponent, its unit and its draw
    height = max(1, devices.at_a_time(BLOCK_ELEMENTS, weight, formed=4) // max(1, width))
    for start in range(0, len(weight), height):
        rows = slice(start, start + height)
        exact = weight[rows].float()
        if compensation is not None:
            exact.add_(compensation[rows])
        exact.mul_(beta).add_(update(rows), alpha=alpha)
        weight[rows] = exact if key is None else round_at_random(exact, weight.dtype, key, first + start * width)
        if compensation is not None:
            compensation[rows] = exact.sub_(weight[rows])


def round_at_random(exact: Tensor, dtype: torch.dtype, key: int, first: int = 0) -> Tensor:
    """Numbers of float32 rounded to one of the two neighbours in another dtype, such that the mean is right.

    Args:
        exact: float32.
        dtype: float16 or bfloat16.
        key: of the random bits, which depend on it and on the place of a number alone.
        first: the place of the first number.

    Returns:
        The same shape, of `dtype`; numbers of the dtype stay as they are.
    """
    digits = torch.finfo(dtype)
    bits, least = round(1 - math.log2(digits.eps)), round(math.log2(digits.smallest_normal * digits.eps))
    exponent = torch.frexp(exact).exponent.sub_(bits).clamp_(min=least)
    unit = torch.ldexp(torch.ones_like(exact), exponent)  # the distance of the two neighbours
    start = (first + 2**31) % 2**32 - 2**31  # places wrap around
    places = torch.arange(exact.numel(), dtype=torch.int32, device=exact.device).add_(start).view(exact.shape)
    draws = uniform(random_bits(places, torch.full((), key, dtype=torch.int32, device=exact.device)))
    return (exact / unit).add_(draws).floor_().mul_(unit).to(dtype)
