"""`AppliedGradient`: what stands in the place of a gradient that has been applied inside the backward pass.

It holds nothing. Whoever still wants to clip, scale or accumulate it comes too late, and is told so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_HARMLESS = {aten.detach.default, aten.detach_.default, aten.zero_.default}
"""What emptying gradients calls; on one that is gone already there is nothing to do."""


class AppliedGradient(Tensor):
    """A gradient of a weight's shape and dtype that is gone: the weight has moved by it.

    Attributes:
        weight_name: what messages call the weight.
    """

    weight_name: str

    @staticmethod
    def __new__(cls: type[AppliedGradient], weight: Tensor, name: str) -> AppliedGradient:  # noqa: D102
        made: AppliedGradient = Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=weight.dtype, device=weight.device, requires_grad=False
        )
        made.weight_name = name
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AppliedGradient({self.weight_name}, shape={tuple(self.shape)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> AppliedGradient:
        return AppliedGradient(self, self.weight_name)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _HARMLESS:
            return args[0]
        if func is aten._foreach_zero_.default:
            others = [one for one in args[0] if not isinstance(one, cls)]
            return func(others) if others else None
        given = [args[0], *(args[0] if isinstance(args[0], (list, tuple)) else ()), *args[1:]]
        name = next((one.weight_name for one in given if isinstance(one, cls)), "a weight")
        what = "a second backward before step()" if "add" in str(func) else str(func)
        raise ValueError(
            f"the gradient of {name} was applied inside the backward pass and is gone, so {what} cannot act on it "
            "(weights have moved already in this step). To accumulate, clip or unscale gradients use "
            'attach(..., update="step")'
        )
