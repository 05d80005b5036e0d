"""`AppliedGradient`: what stands in the place of a gradient that has been applied inside the backward pass.

It holds nothing but its norm, for logging. Clipping, scaling or accumulating it raises an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from galore_torch.lowbit import WithoutMemory

aten = torch.ops.aten

_HARMLESS = {aten.detach.default, aten.detach_.default, aten.zero_.default}
"""What emptying gradients calls; on one that is gone already there is nothing to do."""


_NORMS = {aten.linalg_vector_norm.default, aten._foreach_norm.Scalar}
_SCALINGS = {aten.mul_.Tensor, aten._foreach_mul_.Tensor}
"""What clipping does; by a factor of 1 it changes nothing."""


class AppliedGradient(WithoutMemory):
    """A gradient of a weight's shape and dtype that is gone: the weight has moved by it.

    Attributes:
        weight_name: what messages call the weight.
        euclidean_norm: the norm that it had, a tensor of no dimensions.
    """

    weight_name: str
    euclidean_norm: Tensor

    @staticmethod
    def __new__(cls: type[AppliedGradient], weight: Tensor, name: str, norm: Tensor) -> AppliedGradient:  # noqa: D102
        made: AppliedGradient = Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=weight.dtype, device=weight.device, requires_grad=False
        )
        made.weight_name, made.euclidean_norm = name, norm
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AppliedGradient({self.weight_name}, shape={tuple(self.shape)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> AppliedGradient:
        return AppliedGradient(self, self.weight_name, self.euclidean_norm)

    def to_full(self) -> Tensor:
        """Raises an error: the numbers are gone."""
        return self.clone()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _HARMLESS:
            return args[0]
        if func is aten._foreach_zero_.default:
            others = [one for one in args[0] if not isinstance(one, cls)]
            return func(others) if others else None
        given = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
        if func in _NORMS and (args[1:] or (2,))[0] == 2:
            norms = [one.euclidean_norm if isinstance(one, cls) else torch.linalg.vector_norm(one) for one in given]
            return norms if isinstance(args[0], (list, tuple)) else norms[0]
        if func in _SCALINGS and isinstance(args[1], Tensor) and args[1].numel() == 1 and float(args[1]) == 1:
            return None if isinstance(args[0], (list, tuple)) else args[0]
        given = [args[0], *(args[0] if isinstance(args[0], (list, tuple)) else ()), *args[1:]]
        name = next((one.weight_name for one in given if isinstance(one, cls)), "a weight")
        what = "a second backward before step()" if "add" in str(func) else str(func)
        raise ValueError(
            f"the gradient of {name} was applied inside the backward pass and is gone, so {what} cannot act on it "
            "(weights have moved already in this step). To accumulate, clip or unscale gradients use "
            'attach(..., update="step")'
        )
