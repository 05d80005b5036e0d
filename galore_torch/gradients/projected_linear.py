"""Linear layers whose backward computes the projected gradient itself, and never the full one.

For y = x W^T the gradient is dW = dY^T X. So P^T dW = (dY P)^T X and dW Q = dY^T (X Q): for N tokens that costs
2 N r (m + n) operations in place of 2 N m n. A layer with a basis on the input side needs X Q for its backward, not X,
and saves that: less memory, unless several layers share the input. One with a basis on the output side alone needs X;
from some tokens of it, drawn at random, it has an unbiased estimate of its gradient.

Shape suffixes: N tokens, m outputs, n inputs, r the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.projection import Basis, Projection

SAMPLED = 4
"""Of so many tokens one is kept, at random, for a gradient that is right on average. A power of two rounds nothing."""


class Plan(NamedTuple):
    """What a layer's passes do as long as no weight makes a step and no one changes a group or a state.

    Attributes:
        version: of what is known of weights.
        weight: the layer's.
        projection: of it.
        basis: None where the full gradient is formed: to renew, or for want of a basis.
        saves_part: whether no more is saved of X than the gradient needs: X Q, or these tokens.
        tokens: of which the gradient is estimated, every `SAMPLED`th from a random one on; None for all.
        in_codes: whether the weight is kept in few bits.
    """

    version: int
    weight: Tensor
    projection: Projection
    basis: Basis | None
    saves_part: bool
    tokens: slice | None
    in_codes: bool


class _Linear(torch.autograd.Function):
    """y = x W^T + b, with a backward that gives W a projected gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(_part(x, plan) if plan.saves_part else x, weight)
        return F.linear(x, _plain(weight, plan, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        plan = ctx.plan
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, grad_y, kept, weight)
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            grad_x = grad_y @ _plain(weight, plan, grad_y.dtype)
        grad_y_nm = _rows(grad_y)
        if needs_weight:
            grad_weight = weight_gradient(plan, grad_y_nm, _rows(kept), weight.dtype)
        if needs_bias:
            grad_bias = grad_y_nm.sum(0)
        return grad_x, grad_weight, grad_bias, None


def _differentiable_backward(ctx: Any, grad_y: Tensor, kept: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    """With create_graph=True the gradients are differentiated themselves, which projected gradients cannot be."""
    plan = ctx.plan
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad_y @ _plain(weight, plan, grad_y.dtype)
        if plan.in_codes:
            grad_x = _Once.apply(grad_x, grad_y, weight)  # type: ignore[no-untyped-call]
    if ctx.needs_input_grad[1] and (plan.saves_part or plan.tokens is not None):
        with torch.no_grad():
            grad_weight = weight_gradient(plan, _rows(grad_y), _rows(kept), weight.dtype)
        grad_weight = _Once.apply(grad_weight, grad_y, weight)  # type: ignore[no-untyped-call]
    elif ctx.needs_input_grad[1]:
        grad_weight = _as(_rows(grad_y).mT @ _rows(kept), weight.dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = _rows(grad_y).sum(0)
    return grad_x, grad_weight, grad_bias, None


class _Once(torch.autograd.Function):
    """A gradient that depends on others in a way that is not known any more: differentiating it is an error."""

    @staticmethod
    def forward(_: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:  # noqa: ARG004
        return gradient.detach().clone()

    @staticmethod
    def backward(*_: Any) -> Any:
        raise RuntimeError(
            "a linear layer under attach(..., gradients='fused') has saved a part of its input alone, so it "
            "cannot be differentiated twice (create_graph=True: gradient penalties, Hessian-vector products); use "
            "save_inputs='full', or gradients='projected' or 'full'"
        )


projected_linear: Callable[..., Tensor] = super(torch.autograd.Function, _Linear).apply
"""`_Linear.apply` without its question for torch.func's transforms, which takes as long as the rest."""


def _plain(weight: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    """A weight as matrix products take it; one in few bits is decoded for this one alone."""
    return weight.decode(dtype) if plan.in_codes else _as(weight, dtype)  # type: ignore[attr-defined]


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _rows(tensor: Tensor) -> Tensor:
    """Tokens as rows, however many axes count them: several, or none."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _part(x: Tensor, plan: Plan) -> Tensor:
    """What the weight's gradient needs of X, where that has a basis."""
    if plan.tokens is not None:
        return _rows(x)[plan.tokens].clone()  # a view would keep all of X
    assert plan.basis is not None
    return x @ _as(plan.basis["right"], x.dtype) if "right" in plan.basis else x


def weight_gradient(plan: Plan, grad_y_nm: Tensor, kept_nn: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient dW = dY^T X, or with a basis the projected gradient.

    Args:
        plan: of the layer.
        grad_y_nm: dY.
        kept_nn: X, or what was saved of it.
        dtype: of the result.
    """
    basis = plan.basis
    if basis is None:
        return _as(grad_y_nm.mT @ kept_nn, dtype)
    if not plan.saves_part:
        kept_nn = _part(kept_nn, plan)
    if plan.tokens is not None:
        grad_y_nm = grad_y_nm[plan.tokens]
    if "left" in basis:
        grad_y_nm = grad_y_nm @ _as(basis["left"], grad_y_nm.dtype)
    projected = grad_y_nm.mT @ kept_nn
    if plan.tokens is not None:
        projected *= SAMPLED
    return ProjectedGradient(_as(projected, dtype), plan.projection, basis, dtype)
