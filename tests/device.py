"""Running the tests' own tensors on another device than the CPU, without a word of it in the tests.

`OnDevice` puts there what a test makes without naming a device. Random numbers are drawn on the CPU and moved, so that
a test sees the same numbers everywhere. What the package makes, by itself or by what it calls, is left alone, and so is
what optimizers make: a tensor for which they forget the device is made on the CPU, as it would be for users.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

chosen = "cpu"
"""What `--device` names."""

DRAWS = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal}
MAKES = _device_constructors() - DRAWS
FILLS = {
    *(Tensor.uniform_, Tensor.normal_, Tensor.exponential_),
    *(nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, nn.init.trunc_normal_),
}
"""What fills a tensor with random numbers in place."""


LEFT_ALONE = ("galore_torch.", "torch.optim.", "torchao.optim.", "bitsandbytes.")
"""The modules whose own tensors, and those of what they call, stay where they are put."""


class OnDevice(TorchFunctionMode):
    """Makes tensors on a device where none is named.

    Args:
        device: its name.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FILLS:
            return self._filled(func, *args, **kwargs)
        named = kwargs.get("device") is not None
        if named or func not in DRAWS | MAKES or _is_made_for_users():
            return func(*args, **kwargs)
        if func in MAKES:
            return func(*args, **{**kwargs, "device": self.device})
        needs_grad = kwargs.pop("requires_grad", False)
        return func(*args, **kwargs).to(self.device).requires_grad_(needs_grad)

    def _filled(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        tensor: Tensor = args[0] if args else kwargs.pop("tensor")
        if tensor.device.type != self.device.type or type(tensor) not in (Tensor, nn.Parameter):
            return func(tensor, *args[1:], **kwargs)
        drawn = func(torch.empty_like(tensor, device="cpu", requires_grad=False), *args[1:], **kwargs)
        with torch.no_grad():
            return tensor.copy_(drawn)


def accelerator() -> Accelerator:
    """Accelerate's object for the device that is chosen."""
    return Accelerator(cpu=chosen == "cpu")


def _is_made_for_users() -> bool:
    """Whether it is the package or an optimizer that calls torch, and not a test, be it by way of other libraries."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module = f"{frame.f_globals.get('__name__', '')}."
        if module.startswith(LEFT_ALONE):
            return True
        if module.startswith("tests."):
            return False
        frame = frame.f_back
    return False
