"""What a linear layer does with a weight in INT8: it decodes it for its forward, and again for its backward.

Nothing decoded is kept in between: the backward's own products read the codes anew.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from galore_torch.lowbit.weights import FUNCTIONS, QuantizedWeight, decoded


# torch.compiler.disable would do the same, and import the compiler with it.
@torch._disable_dynamo  # type: ignore[attr-defined]
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Y = x W^T + b, keeping no decoded copy for the backward. The gradient of the weight is a plain tensor.

    Args:
        input: (..., n).
        weight: (m, n).
        bias: (m,).

    Returns:
        (..., m).
    """
    if not isinstance(weight, QuantizedWeight):  # it is the input that is kept in INT8, or the bias
        return F.linear(*decoded((input, weight, bias)))
    kind, dtype = input.device.type, weight.dtype
    autocast = torch.is_autocast_enabled(kind)
    if autocast:
        dtype = torch.get_autocast_dtype(kind)
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False) if autocast else nullcontext():
        y: Tensor = _Linear.apply(input, weight, bias, dtype)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.decode(dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ weight.decode(grad_y.dtype)
        grad_y_nm = grad_y.reshape(-1, grad_y.shape[-1])
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_y_nm.mT @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y_nm.sum(0)
        return grad_x, grad_weight, grad_bias, None


FUNCTIONS[F.linear] = linear
