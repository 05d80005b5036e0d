"""`Codes`: a tensor in 8 or 4 bits a number, with a scale for every group of numbers.

The tensor is read in its own order and cut into groups; a last group that is short is filled up with its last number.
Each number is stored as a whole-number code:

* *ranged*: `low + code * scale`, between the least and the largest number of the group. A group of one sign, or of one
  value, loses nothing to the other sign. Bases and images are kept so (Q-GaLore, arXiv 2407.08296).
* *symmetric*: `(code - zero) * scale / top`, where `scale` is the group's largest magnitude and `top` its code. That
  magnitude is kept exactly, so that numbers which were codes once, and were then written out in bfloat16, become the
  same codes again. Weights are kept so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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
    def of(
        cls,
        tensor: Tensor,
        bits: int = 8,
        group_size: int = 256,
        *,
        symmetric: bool = False,
        noise: torch.Generator | None = None,
    ) -> Codes:
        """A tensor in few bits.

        Args:
            tensor: of any floating dtype. A group with a number that is not finite decodes to no finite number.
            bits: 8 or 4.
            group_size: numbers in a group, even.
            symmetric: whether codes lie evenly on both sides of zero.
            noise: where random numbers come from, on the tensor's device: codes are then rounded up or down at random
                so that they are right on average (symmetric only). None rounds to the nearest.

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
        codes, scale, low = _symmetric(groups, bits, noise) if symmetric else _ranged(groups, bits)
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
        scale = self.scale.to(torch.float32).unsqueeze(-1)
        if self.low is None:
            top = _top(self.bits)
            numbers = groups.to(torch.float32).sub_(top + 1).mul_(scale / top)
        else:
            numbers = torch.addcmul(self.low.to(torch.float32).unsqueeze(-1), groups.to(torch.float32), scale)
        return numbers.to(dtype).flatten()[: math.prod(self.shape)].view(self.shape)


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


def _symmetric(groups: Tensor, bits: int, noise: torch.Generator | None) -> tuple[Tensor, Tensor, None]:
    top = _top(bits)
    largest = groups.abs().amax(dim=1, keepdim=True)
    scale = largest.to(SCALES) if noise is None else _rounded_at_random(largest, noise)
    step = torch.where(scale == 0, 1.0, scale.float()) / top
    exact = groups / step
    codes = exact.round() if noise is None else (exact + _uniform(exact, noise)).floor_()
    codes = torch.where(groups.abs() == largest, groups.sign() * top, codes).clamp_(-top, top)
    return (codes + (top + 1)).to(torch.uint8), scale.flatten(), None


def _uniform(like: Tensor, noise: torch.Generator) -> Tensor:
    """Random numbers from 0 to below 1."""
    return torch.rand(like.shape, generator=noise, device=like.device)


def _rounded_at_random(magnitudes: Tensor, noise: torch.Generator) -> Tensor:
    """float32 magnitudes as bfloat16, up or down at random: bfloat16 is the upper half of the bits of float32."""
    lower_half = torch.randint(0, 2**16, magnitudes.shape, generator=noise, device=magnitudes.device, dtype=torch.int32)
    bits = (magnitudes.contiguous().view(torch.int32) + lower_half) & -(2**16)
    return torch.where(magnitudes.isfinite(), bits.view(torch.float32), magnitudes).to(SCALES)
