"""`Codes`: a tensor in 8 or 4 bits a number, with a scale for every group of numbers.

The tensor is read in its own order and cut into groups; a last group that is short is filled up with its last number.
Each number is stored as a whole-number code:

* *ranged*: `low + code * scale`, between the least and the largest number of the group. A group of one sign, or of one
  value, loses nothing to the other sign. Bases and projected gradients are kept so (Q-GaLore, arXiv 2407.08296).
* *symmetric*: `(code - zero) * scale / top`, where `scale` is the group's largest magnitude and `top` its code. That
  magnitude is kept exactly, so that numbers which were codes once, and were then written out in bfloat16, become the
  same codes again. Weights are kept so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from galore_torch.random_bits import random_bits, uniform

BITS = (8, 4)
SCALES = torch.bfloat16
"""What scales are stored in: their range is wide, and codes are chosen for the scale as it is stored."""


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A tensor in few bits.

    Attributes:
        codes: uint8; one number a byte, or two in 4 bits, the first of them in the low half.
        scale: (groups,), how far two neighbouring codes are apart; the largest magnitude if symmetric.
        low: (groups,), what code 0 stands for; None if symmetric.
        shape: of the tensor.
        bits: 8 or 4.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor | None
    shape: tuple[int, ...]
    bits: int

    @classmethod
    def of(cls, tensor: Tensor, bits: int = 8, group_size: int = 256, *, symmetric: bool = False) -> Codes:
        """A tensor in few bits, rounded to the nearest.

        Args:
            tensor: of any floating dtype. A group with a number that is not finite decodes to no finite number.
            bits: 8 or 4.
            group_size: numbers in a group, even.
            symmetric: whether codes lie evenly on both sides of zero.

        Returns:
            The codes.

        Raises:
            ValueError: another number of bits, or a group size that is odd or below 2.

        Example:
            >>> codes = Codes.of(torch.linspace(-1, 1, 512), bits=4, group_size=64)
            >>> codes.stored_bytes, bool((codes.decode() - torch.linspace(-1, 1, 512)).abs().max() < 0.01)
            (288, True)
        """
        check_bits(bits, group_size)
        groups = _groups(tensor.detach(), group_size)
        if symmetric:
            low = None
            codes, scale = symmetric_codes(groups, bits, None)
        else:
            codes, scale, low = _ranged(groups, bits)
        if bits == 4:
            codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
        return cls(codes=codes.flatten(), scale=scale, low=low, shape=tuple(tensor.shape), bits=bits)

    @property
    def stored_bytes(self) -> int:
        """The bytes of codes and scales."""
        tensors = [self.codes, self.scale] + ([] if self.low is None else [self.low])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor that the codes stand for.

        Args:
            dtype: of the result.

        Returns:
            Of the tensor's shape, contiguous.
        """
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1)
        groups = codes.view(self.scale.numel(), -1)
        if self.low is None:
            numbers = symmetric_numbers(groups, self.scale, self.bits)
        else:
            scale = self.scale.to(torch.float32).unsqueeze(-1)
            numbers = torch.addcmul(self.low.to(torch.float32).unsqueeze(-1), groups.to(torch.float32), scale)
        return numbers.to(dtype).flatten()[: math.prod(self.shape)].view(self.shape)


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor has more than sizes: not so on the device `meta`, or in a plan of memory."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def check_bits(bits: int, group_size: int) -> None:
    """Checks how a tensor is to be kept.

    Args:
        bits: a number.
        group_size: numbers in a group.

    Raises:
        ValueError: another number of bits than 8 or 4, or a group size that is odd or below 2.
    """
    if bits not in BITS:
        raise ValueError(f"bits is {bits!r}; use 8 or 4")
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2 or group_size % 2:
        raise ValueError(f"group_size is {group_size!r}; use an even whole number, such as 256")


def _groups(tensor: Tensor, group_size: int) -> Tensor:
    """(groups, group_size) in float32."""
    flat = tensor.flatten().to(torch.float32)
    short = -flat.numel() % group_size
    if short:
        flat = torch.cat((flat, flat[-1:].expand(short)))
    return flat.view(-1, group_size)


def _top(bits: int) -> int:
    """The largest code on either side of zero."""
    return (1 << (bits - 1)) - 1


def _ranged(groups: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    least, most = groups.aminmax(dim=1, keepdim=True)
    # Both are rounded outwards, so that the range covers the group.
    low = (least - least.abs() * 2**-8).to(SCALES)
    scale = ((most - low.float()) * ((1 + 2**-8) / (2**bits - 1))).to(SCALES)
    step = torch.where(scale == 0, 1.0, scale.float())
    codes = ((groups - low.float()) / step).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scale.flatten(), low.flatten()


def symmetric_codes(groups: Tensor, bits: int, key: Tensor | None, first: int | Tensor = 0) -> tuple[Tensor, Tensor]:
    """Groups of numbers as codes that lie evenly on both sides of zero.

    Args:
        groups: (groups, group size), float32.
        bits: 8 or 4.
        key: of random numbers (`random_bits.key_of`), int32: codes are then rounded up or down at random, so that they
            are right on average. None rounds to the nearest.
        first: place of the first number, where the groups are part of a larger tensor. Whole groups come before it.

    Returns:
        (groups, group size) uint8, one a number, and the scales, (groups,) bfloat16.
    """
    top = _top(bits)
    largest = groups.abs().amax(dim=1, keepdim=True)
    noise = None
    if key is not None:
        count, size = groups.shape
        places = torch.arange(count * size, dtype=torch.int32, device=groups.device).view(count, size) + first
        noise = random_bits(places, key)
    # A group's own bits: those of its first number, hashed once more.
    scale = _rounded(largest, None if noise is None or key is None else random_bits(noise[:, :1], key))
    step = torch.where(scale == 0, 1.0, scale) / top
    exact = groups / step
    codes = exact.round() if noise is None else (exact + uniform(noise)).floor()
    codes = torch.where(groups.abs() == largest, groups.sign() * top, codes).clamp(-top, top)
    return (codes + (top + 1)).to(torch.uint8), scale.flatten().to(SCALES)


def symmetric_numbers(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """What symmetric codes stand for.

    Args:
        codes: (groups, group size) uint8, one a number.
        scale: (groups,).
        bits: 8 or 4.

    Returns:
        (groups, group size) float32.
    """
    top = _top(bits)
    return (codes.to(torch.float32) - (top + 1)) * (scale.to(torch.float32).unsqueeze(-1) / top)


def _rounded(magnitudes: Tensor, noise: Tensor | None) -> Tensor:
    """float32 magnitudes that bfloat16 holds: to the nearest, or with noise up or down at random.

    By their bits, of which bfloat16 keeps the upper half. A cast there and back a compiler may leave out.
    """
    bits = magnitudes.contiguous().view(torch.int32)
    added = 0x7FFF + ((bits >> 16) & 1) if noise is None else noise & 0xFFFF
    return torch.where(magnitudes.isfinite(), ((bits + added) & -(2**16)).view(torch.float32), magnitudes)
