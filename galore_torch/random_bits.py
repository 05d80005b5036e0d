"""Random bits that depend on a key and a place alone: the same on every device, in any order, in parts or at once.

A generator of torch draws one number after the other on a CPU, and on a GPU other numbers on a card with another number
of multiprocessors. Here the bits of place i are a hash of i and the key (a counter-based generator, as Salmon et al.
2011, "Parallel random numbers: as easy as 1, 2, 3"), by a few integer operations that a compiler can put into the loop
that uses them. The hash is Wellons' `lowbias32`, whose outputs flip with a probability within 0.17 % of one half
when one input bit flips.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 2**32


def key_of(*numbers: int) -> int:
    """A key from whole numbers, such as a seed and the number of a step.

    Args:
        *numbers: of any size and sign. Each matters, and so does their order.

    Returns:
        From -2**31 to below 2**31, to be held in an int32 tensor.

    Example:
        >>> key_of(0, 1) != key_of(1, 0)
        True
    """
    state = 0
    for number in numbers:  # SplitMix64 (Steele, Lea and Flood 2014)
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return _signed(state % _WORD)


def random_bits(places: Tensor, key: Tensor) -> Tensor:
    """32 random bits for each place.

    Args:
        places: int32, of any shape.
        key: int32, of no dimensions.

    Returns:
        int32, of the places' shape.
    """
    bits = places ^ key
    bits = (bits ^ _right(bits, 16)) * _signed(0x7FEB352D)
    bits = (bits ^ _right(bits, 15)) * _signed(0x846CA68B)
    return bits ^ _right(bits, 16)


def uniform(bits: Tensor) -> Tensor:
    """Numbers from 0 to below 1 with 24 random bits each.

    Args:
        bits: int32.

    Returns:
        float32, of the same shape.

    Example:
        >>> numbers = uniform(random_bits(torch.arange(4096, dtype=torch.int32), torch.tensor(7, dtype=torch.int32)))
        >>> bool((numbers.mean() - 0.5).abs() < 0.02), bool(numbers.max() < 1)
        (True, True)
    """
    return _right(bits, 8).to(torch.float32) * 2.0**-24


def bell_curve(bits: Tensor) -> Tensor:
    """Numbers that are nearly normal, of variance 1 and never 0: sums of four bytes, equal on every device.

    Args:
        bits: int32.

    Returns:
        float32, of the same shape, from -3.5 to 3.5.

    Example:
        >>> numbers = bell_curve(random_bits(torch.arange(4096, dtype=torch.int32), torch.tensor(7, dtype=torch.int32)))
        >>> bool(numbers.mean().abs() < 0.05), bool((numbers.std() - 1).abs() < 0.05)
        (True, True)
    """
    pairs = (bits & 0x00FF00FF) + ((bits >> 8) & 0x00FF00FF)
    total = (pairs & 0xFFFF) + (pairs >> 16)
    numbers: Tensor = (total - 509.5).to(torch.float32) * (4 * (2**16 - 1) / 12) ** -0.5
    return numbers


def _right(bits: Tensor, count: int) -> Tensor:
    """Shifted right with zeros: int32 is signed, and its own shift repeats the sign."""
    return (bits >> count) & ((1 << (32 - count)) - 1)


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word
