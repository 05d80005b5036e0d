"""Which way a computation takes on a device, and how much of it at a time."""

from __future__ import annotations

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


def at_a_time(on_cpu: int, tensor: Tensor, *, formed: int = 1) -> int:
    """How many numbers are worked on at a time, so that what is formed of them stays small and the device busy.

    Args:
        on_cpu: how many on a CPU.
        tensor: one that is on the device.
        formed: how many numbers are formed for each.
    """
    return ON_GPU // formed if runs_ahead(tensor) else on_cpu
