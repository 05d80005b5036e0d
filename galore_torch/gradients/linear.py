"""Linear layers whose backward computes the projected gradient itself, and never the full one.

For y = x W^T the gradient is dW = dY^T X. So P^T dW = (dY P)^T X and dW Q = dY^T (X Q): for N tokens that costs
2 N r (m + n) operations in place of 2 N m n. A layer with a basis on the input side needs X Q for its backward, not X,
and saves that: less memory, unless several layers share the input.

Shape suffixes: N tokens, m outputs, n inputs, r the rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from galore_torch.lowbit import QuantizedWeight
from galore_torch.optim.galore import GaLore
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.state_keys import STEP
from galore_torch.optim.trained_weight import TrainedWeight
from galore_torch.projection import Basis, Projection


class SharedInput:
    """The layers that were last given one and the same input, one after the other (q, k, v; gate, up).

    Attributes:
        layers: in the order of their calls.
    """

    def __init__(self) -> None:
        self.layers: list[FusedLinear] = []

    def project_inputs(self) -> bool:
        """Whether saving every layer's X Q takes no more than saving X once. One layer that needs X decides for all."""
        if not self.layers or not all(layer.can_project_input() for layer in self.layers):
            return False
        return sum(layer.rank for layer in self.layers) <= self.layers[0].inputs


class FusedLinear:
    """What replaces the forward of one linear layer while it is attached.

    Args:
        module: the layer.
        optimizer: holds its weight, projected.
        tracker: who shares an input with whom; one object for all layers of a model.
    """

    def __init__(self, module: nn.Linear, optimizer: GaLore, tracker: InputTracker) -> None:
        self.module = module
        self.optimizer = optimizer
        self.tracker = tracker
        self.shared = SharedInput()
        self._decided: tuple[int, bool] | None = None
        # Layers take turns to renew; a compiler that looked inside would compile again for each. Not a decorator: it
        # imports the compiler.
        self._forward = torch.compiler.disable(self._form)  # type: ignore[no-untyped-call]

    @property
    def trained(self) -> TrainedWeight:
        """The weight as the next step will see it. Looked up each time: loading a checkpoint replaces state."""
        return self.optimizer._trained_weight(self.module.weight)

    @property
    def inputs(self) -> int:
        """The length n of an input."""
        return self.module.in_features

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.trained.projection.modes[0].rank

    def can_project_input(self) -> bool:
        """Whether X Q is all that this layer's backward needs of X."""
        trained = self.trained
        return not trained.needs_renewal and [mode.name for mode in trained.projection.modes] == ["right"]

    def projects_input(self, trained: TrainedWeight) -> bool:
        """Whether this step's backward gets X Q. Decided once a step, so that a recomputed forward decides the same."""
        step = trained.state[STEP]
        if self._decided is None or self._decided[0] != step:
            self._decided = step, self.shared.project_inputs()
        return self._decided[1]

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's forward."""
        y: Tensor = self._forward(x) if torch.compiler.is_compiling() else self._form(x)
        return y

    def _form(self, x: Tensor) -> Tensor:
        weight, bias = self.module.weight, self.module.bias
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return F.linear(x, weight, bias)
        trained = self.trained
        decided = self.projects_input(trained)  # by what the steps before have shown
        self.tracker.record_call(self, x)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            with torch.autocast(x.device.type, enabled=False):
                return self._apply(trained, x.to(dtype), None if bias is None else bias.to(dtype), decided)
        return self._apply(trained, x, bias, decided)

    def _apply(self, trained: TrainedWeight, x: Tensor, bias: Tensor | None, projects_input: bool) -> Tensor:
        # Without a basis the full gradient is formed: to renew, or for want of one. A checkpoint loaded since it was
        # decided what to save may have taken the basis away.
        basis = None if trained.needs_renewal else trained.basis
        y: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            x, trained.weight, bias, trained.projection, basis, projects_input and basis is not None
        )
        return y

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled layer gets its own forward in this place: the hooks stay behind, and so does this."""
        return nn.Linear.forward.__get__, (self.module,)


class InputTracker:
    """Finds out which layers share an input, by the order of their calls."""

    def __init__(self) -> None:
        self._last_input: Callable[[], Tensor | None] = lambda: None
        self._current = SharedInput()

    def record_call(self, layer: FusedLinear, x: Tensor) -> None:
        """Notes a call. What is learned holds from the next step on, when all that share the input are known."""
        if self._last_input() is not x or layer in self._current.layers:
            self._last_input, self._current = weakref.ref(x), SharedInput()
        self._current.layers.append(layer)
        layer.shared = self._current


class _Linear(torch.autograd.Function):
    """y = x W^T + b, with a backward that gives W a projected gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        projection: Projection,
        basis: Basis | None,
        projects_input: bool,
    ) -> Tensor:
        ctx.projection, ctx.basis, ctx.projects_input = projection, basis, projects_input
        kept = x
        if projects_input:
            assert basis is not None
            kept = x @ basis["right"].to(x.dtype)
        ctx.save_for_backward(kept, weight)
        return F.linear(x, _plain(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        # With create_graph=True the gradients will be differentiated themselves, which projected gradients cannot be.
        differentiable = torch.is_grad_enabled()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ _plain(weight, grad_y.dtype)
            if differentiable and isinstance(weight, QuantizedWeight):
                grad_x = _Once.apply(grad_x, grad_y, weight)  # type: ignore[no-untyped-call]
        grad_y_nm = _rows(grad_y)
        if ctx.needs_input_grad[1]:
            basis = None if differentiable and not ctx.projects_input else ctx.basis
            with torch.set_grad_enabled(differentiable and not ctx.projects_input):
                grad_weight = _weight_gradient(ctx, basis, grad_y_nm, _rows(kept), weight.dtype)
            if differentiable and ctx.projects_input:
                grad_weight = _Once.apply(grad_weight, grad_y, weight)  # type: ignore[no-untyped-call]
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y_nm.sum(0)
        return grad_x, grad_weight, grad_bias, None, None, None


class _Once(torch.autograd.Function):
    """A gradient that depends on others in a way that is not known any more: differentiating it is an error."""

    @staticmethod
    def forward(_: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:  # noqa: ARG004
        return gradient.detach().clone()

    @staticmethod
    def backward(*_: Any) -> Any:
        raise RuntimeError(
            "a linear layer under attach(..., gradients='fused') has saved its input in projected form alone, so it "
            "cannot be differentiated twice (create_graph=True: gradient penalties, Hessian-vector products); use "
            "gradients='projected' or 'full'"
        )


def _plain(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as matrix products take it; one in few bits is decoded for this one alone."""
    return weight.decode(dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)


def _rows(tensor: Tensor) -> Tensor:
    """Tokens as rows, however many axes count them: several, or none."""
    return tensor.reshape(-1, tensor.shape[-1])


def _weight_gradient(ctx: Any, basis: Basis | None, grad_y_nm: Tensor, kept_nn: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient dW = dY^T X, or with a basis the projected gradient."""
    if basis is None:
        return (grad_y_nm.mT @ kept_nn).to(dtype)
    for mode in ctx.projection.modes:
        factor = basis[mode.name].to(grad_y_nm.dtype)
        if mode.name == "left":
            grad_y_nm = grad_y_nm @ factor
        elif not ctx.projects_input:
            kept_nn = kept_nn @ factor
    projected = grad_y_nm.mT @ kept_nn
    return ProjectedGradient(projected.to(dtype), ctx.projection, basis, dtype)


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is an `nn.Linear` that keeps its forward."""
    return isinstance(module, nn.Linear) and getattr(module.forward, "__func__", None) is nn.Linear.forward


def fuse(module: nn.Linear, layer: FusedLinear) -> Callable[[], None]:
    """Replaces a layer's forward.

    Args:
        module: the layer.
        layer: what is called in place of its forward.

    Returns:
        A function that puts the forward back as it was.
    """
    module.forward = layer  # type: ignore[method-assign, assignment]

    def restore() -> None:
        del module.forward

    return restore
