"""Which way a computation takes: the one that reads numbers back where that is free, or the one that never does."""

from __future__ import annotations

from torch import Tensor


def runs_ahead(tensor: Tensor) -> bool:
    """Whether the host runs ahead of the device that holds a tensor, so that reading a number of it would wait.

    Args:
        tensor: of any device.
    """
    return tensor.is_cuda
