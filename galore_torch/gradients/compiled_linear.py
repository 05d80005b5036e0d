"""A fused layer in a compiled model: it is compiled with the others, but for one operator.

Whether a layer renews its basis, and in which basis its gradient is formed, changes from step to step. A compiler that
saw it would compile again each time, so it sees an operator that returns a gradient of the weight's shape. What that is
in truth, full or projected, the operator asks the layer when it runs. The input is saved as it is: a compiler has to
know the shapes of what it saves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(Protocol):
    """What forms the gradient of a weight."""

    def holds(self, weight: Tensor) -> bool:
        """Whether it is the layer of this weight."""

    def gradient(self, weight: Tensor, grad_y_nm: Tensor, x_nn: Tensor) -> Tensor:
        """The gradient dW = dY^T X, full or projected."""


LAYERS: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
"""The fused layers, by the identity of their weight. Of those that share one any will do."""


@torch.library.custom_op("galore_torch::weight_gradient", mutates_args=(), tags=(torch._C.Tag.cudagraph_unsafe,))
def weight_gradient(grad_y_nm: Tensor, x_nn: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a fused layer's weight: what its optimizer wants to have in this step.

    Args:
        grad_y_nm: the gradient of its output.
        x_nn: its input.
        weight: of the layer.

    Returns:
        A tensor of the weight's shape and dtype: a plain one, or a `ProjectedGradient`.
    """
    layer = LAYERS.get(id(weight))
    if layer is None or not layer.holds(weight):  # the weight was replaced in its layer
        layer = next((one for one in LAYERS.values() if one.holds(weight)), None)
    if layer is None:  # it is not attached any more
        return (grad_y_nm.mT @ x_nn).to(weight.dtype)
    LAYERS[id(weight)] = layer
    return layer.gradient(weight, grad_y_nm, x_nn)


@weight_gradient.register_fake
def _(grad_y_nm: Tensor, x_nn: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(weight)


class CompiledLinear(torch.autograd.Function):
    """y = x W^T + b as a compiler may see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, weight = ctx.saved_tensors
        grad_y_nm = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = grad_y @ weight.to(grad_y.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad_y_nm.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, weight_gradient(grad_y_nm, x.reshape(-1, x.shape[-1]), weight), grad_bias


def compiled_linear(module: nn.Linear, x: Tensor) -> Tensor:
    """A fused layer's forward as a compiler is to see it.

    Args:
        module: with a plain weight.
        x: its input.

    Returns:
        Its output.
    """
    weight, bias = module.weight, module.bias
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return F.linear(x, weight, bias)
    return in_autocast(CompiledLinear.apply, x, weight, bias)


def in_autocast(linear: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, *more: Any) -> Tensor:
    """What a layer returns, in the dtype of autocast where that is on, which knows nothing of these layers.

    Args:
        linear: of input, weight, bias and what else there is; it casts the weight as its input is.
        x: the input.
        weight: of the layer.
        bias: of the layer.
        *more: handed on.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return linear(x, weight, bias, *more)
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return linear(x.to(dtype), weight, None if bias is None else bias.to(dtype), *more)
