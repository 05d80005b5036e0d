"""Which way a computation takes on a device, and how much of it at a time."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

ON_GPU = 2**25
"""Numbers that a GPU forms at a time, about: it needs as many to be busy, and a call costs the host half a millisecond,
however small it is."""


def runs_ahead(tensor: Tensor) -> bool:
    """Whether the host runs ahead of the device that holds a tensor, so that reading a number of it would wait.

    Args:
        tensor: of any device.
    """
    return tensor.is_cuda


def is_captured(tensor: Tensor) -> bool:
    """Whether what is done with a tensor goes into a CUDA graph that is being captured, and is not done now.

    Args:
        tensor: of any device.
    """
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def multiplies_bfloat16(tensor: Tensor) -> bool:
    """Whether the device that holds a tensor multiplies matrices of bfloat16 at speed: a CPU of few years or none does.

    Args:
        tensor: of any device.
    """
    return runs_ahead(tensor) or cpu_multiplies_bfloat16()


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it. Without them torch takes 8 to 80 times as long as in float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def at_a_time(on_cpu: int, tensor: Tensor, *, formed: int = 1) -> int:
    """How many numbers are worked on at a time, so that what is formed of them stays small and the device busy.

    Args:
        on_cpu: how many on a CPU.
        tensor: one that is on the device.
        formed: how many numbers are formed for each.
    """
    return ON_GPU // formed if runs_ahead(tensor) else on_cpu


def largest_entry(tensor: Tensor, dim: Sequence[int] = (), *, keepdim: bool = False) -> Tensor:
    """The largest absolute entry: NaN where there is one.

    torch's infinity norm is a single operation, and on a CPU takes six to fifteen times as long as these two.

    Args:
        tensor: of any floating dtype, not empty.
        dim: the axes over which it is looked for; all of them when empty.
        keepdim: whether these axes stay, with a size of 1.

    Returns:
        Of the tensor's dtype.

    Example:
        >>> largest_entry(torch.tensor([[1.0, -3.0], [2.0, 0.0]]), (-1,))
        tensor([3., 2.])
    """
    if runs_ahead(tensor):
        norm: Tensor = torch.linalg.vector_norm(tensor, float("inf"), dim=tuple(dim) or None, keepdim=keepdim)
        return norm
    return tensor.abs().amax(dim=tuple(dim), keepdim=keepdim)
