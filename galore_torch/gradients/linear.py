"""Linear layers whose backward computes the projected gradient itself, and never the full one.

For y = x W^T the gradient is dW = dY^T X. So P^T dW = (dY P)^T X and dW Q = dY^T (X Q): for N tokens that costs
2 N r (m + n) operations in place of 2 N m n. A layer with a basis on the input side needs X Q for its backward, not X,
and saves that: less memory, unless several layers share the input.

Shape suffixes: N tokens, m outputs, n inputs, r the rank.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from galore_torch.gradients.compiled_linear import LAYERS, compiled_linear
from galore_torch.gradients.known_weights import KnownWeights
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
        self._decided: tuple[int, bool] = (-1, False)

    def project_inputs(self, version: int) -> bool:
        """Whether saving every layer's X Q takes no more than saving X once. One layer that needs X decides for all.

        Args:
            version: of what is known of weights; as long as it is the same all layers get the same answer.
        """
        if self._decided[0] != version:
            ranks = [layer.input_rank(version) for layer in self.layers]
            fits = bool(ranks) and 0 not in ranks and sum(ranks) <= self.layers[0].module.in_features
            self._decided = version, fits
        return self._decided[1]


class Plan(NamedTuple):
    """What a layer's passes do as long as no weight makes a step and no one changes a group or a state.

    Attributes:
        version: of what is known of weights.
        weight: the layer's.
        projection: of it.
        basis: None where the full gradient is formed: to renew, or for want of a basis.
        projects_input: whether X Q is saved for the backward, not X.
        in_codes: whether the weight is kept in few bits.
    """

    version: int
    weight: Tensor
    projection: Projection
    basis: Basis | None
    projects_input: bool
    in_codes: bool


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
        self._plan: Plan | None = None
        self._looked: tuple[int, Tensor, TrainedWeight, Basis | None] | None = None
        self._decided: tuple[int, bool] | None = None

    def _look(self, version: int) -> tuple[TrainedWeight, Basis | None]:
        """What is known of the weight, and its basis if that is not to be renewed in this step."""
        looked, weight = self._looked, self.module.weight
        if looked is None or looked[0] != version or looked[1] is not weight:
            trained = self.optimizer._known_weight(weight)
            looked = self._looked = version, weight, trained, None if trained.needs_renewal else trained.basis
        return looked[2:]

    def input_rank(self, version: int) -> int:
        """The length of a row of X Q, if that is all that this layer's backward needs of X; else 0.

        Args:
            version: of what is known of weights.
        """
        trained, basis = self._look(version)
        modes = trained.projection.modes
        return modes[0].rank if basis is not None and len(modes) == 1 and modes[0].name == "right" else 0

    def _planned(self, weight: Tensor) -> Plan:
        """What to do from now on. The first layer of a pass looks for what a user may have changed, in all weights."""
        optimizer, tracker = self.optimizer, self.tracker
        if tracker.first is self or tracker.version != optimizer._cache.version:
            optimizer._checked_weights()
            tracker.first, tracker.version = self, optimizer._cache.version
        version = optimizer._cache.version
        trained, basis = self._look(version)
        step = trained.state[STEP]
        # What to save is decided once a step, by what the steps before have shown: a recomputed forward decides the
        # same. But a checkpoint that is loaded in between may take the basis away.
        if self._decided is None or self._decided[0] != step:
            self._decided = step, self.shared.project_inputs(version)
        projects_input = self._decided[1] and basis is not None
        in_codes = isinstance(weight, QuantizedWeight)
        self._plan = Plan(version, weight, trained.projection, basis, projects_input, in_codes)
        return self._plan

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's forward."""
        parameters = self.module._parameters  # what the layer's attributes look into, too
        weight, bias = parameters["weight"], parameters["bias"]
        assert weight is not None
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return F.linear(x, weight, bias)
        plan, tracker = self._plan, self.tracker
        if (
            plan is None
            or plan.version != self.optimizer._cache.version
            or plan.weight is not weight
            or tracker.first is self
        ):
            plan = self._planned(weight)
        tracker.record_call(self, x)
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return _linear(x, weight, bias, plan)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            cast = None if bias is None else bias.to(dtype)
            return _linear(x.to(dtype), weight, cast, plan)

    def holds(self, weight: Tensor) -> bool:
        """See `compiled_linear.Layer`."""
        return self.module.weight is weight

    @torch.no_grad()
    def gradient(self, weight: Tensor, grad_y_nm: Tensor, x_nn: Tensor) -> Tensor:
        """See `compiled_linear.Layer`."""
        trained = self.tracker.known.in_backward(weight)
        assert trained is not None
        basis = None if trained.needs_renewal else trained.basis
        plan = Plan(self.optimizer._cache.version, weight, trained.projection, basis, False, False)
        return _weight_gradient(plan, basis, grad_y_nm, x_nn, weight.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled module is a plain layer: the hooks stay behind, and so does this."""
        return type(None), ()


class InputTracker:
    """Finds out which layers share an input, by the order of their calls.

    Args:
        optimizer: holds their weights.

    Attributes:
        known: what hooks know of the weights.
        first: the layer that was called first since all weights were looked at, and looks at them again when it is
            called again: once in each pass over the model.
        version: of what was known of them then.
    """

    def __init__(self, optimizer: GaLore) -> None:
        self.known = KnownWeights(optimizer)
        self._last_input: Callable[[], Tensor | None] = lambda: None
        self._current = SharedInput()
        self.first: FusedLinear | None = None
        self.version = -1

    def record_call(self, layer: FusedLinear, x: Tensor) -> None:
        """Notes a call. What is learned holds from the next step on, when all that share the input are known."""
        if self._last_input() is not x or layer in self._current.layers:
            self._last_input, self._current = weakref.ref(x), SharedInput()
        self._current.layers.append(layer)
        layer.shared = self._current


class _Linear(torch.autograd.Function):
    """y = x W^T + b, with a backward that gives W a projected gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
        ctx.plan = plan
        if plan.projects_input:
            assert plan.basis is not None
            ctx.save_for_backward(x @ _as(plan.basis["right"], x.dtype), weight)
        else:
            ctx.save_for_backward(x, weight)
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
            grad_weight = _weight_gradient(plan, plan.basis, grad_y_nm, _rows(kept), weight.dtype)
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
    if ctx.needs_input_grad[1] and plan.projects_input:
        with torch.no_grad():
            grad_weight = _weight_gradient(plan, plan.basis, _rows(grad_y), _rows(kept), weight.dtype)
        grad_weight = _Once.apply(grad_weight, grad_y, weight)  # type: ignore[no-untyped-call]
    elif ctx.needs_input_grad[1]:
        grad_weight = _weight_gradient(plan, None, _rows(grad_y), _rows(kept), weight.dtype)
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
            "a linear layer under attach(..., gradients='fused') has saved its input in projected form alone, so it "
            "cannot be differentiated twice (create_graph=True: gradient penalties, Hessian-vector products); use "
            "gradients='projected' or 'full'"
        )


_apply = super(torch.autograd.Function, _Linear).apply


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """`_Linear.apply` without its question for torch.func's transforms, which takes as long as the rest."""
    apply = _Linear.apply if torch._C._are_functorch_transforms_active() else _apply
    y: Tensor = apply(x, weight, bias, plan)  # type: ignore[no-untyped-call]
    return y


def _plain(weight: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    """A weight as matrix products take it; one in few bits is decoded for this one alone."""
    return weight.decode(dtype) if plan.in_codes else _as(weight, dtype)  # type: ignore[attr-defined]


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _rows(tensor: Tensor) -> Tensor:
    """Tokens as rows, however many axes count them: several, or none."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _weight_gradient(plan: Plan, basis: Basis | None, grad_y_nm: Tensor, kept_nn: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient dW = dY^T X, or with a basis the projected gradient."""
    if basis is None:
        return _as(grad_y_nm.mT @ kept_nn, dtype)
    for mode in plan.projection.modes:
        if mode.name == "left":
            grad_y_nm = grad_y_nm @ _as(basis["left"], grad_y_nm.dtype)
        elif not plan.projects_input:
            kept_nn = kept_nn @ _as(basis["right"], grad_y_nm.dtype)
    return ProjectedGradient(_as(grad_y_nm.mT @ kept_nn, dtype), plan.projection, basis, dtype)


_LAYER = "_galore_fused"
"""The attribute of a module that holds what runs in its forward's place."""


def forward(module: nn.Linear, x: Tensor) -> Tensor:
    """That of all fused layers: one function, so that a compiler takes equal layers for the same.

    Its name is that of the method in whose place it is: by that a pickled module finds the method that it had.
    """
    if torch.compiler.is_compiling():
        return _not_compiled(module, x) if isinstance(module.weight, QuantizedWeight) else compiled_linear(module, x)
    layer: FusedLinear | None = module.__dict__[_LAYER]
    return F.linear(x, module.weight, module.bias) if layer is None else layer(x)


_not_compiled = torch._disable_dynamo(forward)  # type: ignore[attr-defined]


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is an `nn.Linear` that keeps its forward."""
    function = getattr(module.forward, "__func__", None)
    is_copy = function is forward and module.__dict__[_LAYER] is None
    return isinstance(module, nn.Linear) and (function is nn.Linear.forward or is_copy)


def fuse(module: nn.Linear, layer: FusedLinear) -> Callable[[], None]:
    """Replaces a layer's forward.

    Args:
        module: the layer.
        layer: what is called in place of its forward.

    Returns:
        A function that puts the forward back as it was.
    """
    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
    setattr(module, _LAYER, layer)
    key = id(module.weight)
    LAYERS[key] = layer

    def restore() -> None:
        del module.forward
        delattr(module, _LAYER)
        LAYERS.pop(key, None)

    return restore
