"""Linear layers whose backward computes the projected gradient itself, and never the full one.

For y = x W^T the gradient is dW = dY^T X. So P^T dW = (dY P)^T X and dW Q = dY^T (X Q): for N tokens that costs
2 N r (m + n) operations in place of 2 N m n. A layer with a basis on the input side needs X Q for its backward, not X,
and saves that: less memory, unless several layers share the input. One with a basis on the output side alone needs X;
from some tokens of it, drawn at random, it has an unbiased estimate of its gradient.

Shape suffixes: N tokens, m outputs, n inputs, r the rank.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from galore_torch.gradients.compiled_linear import LAYERS, compiled_linear, in_autocast
from galore_torch.gradients.shared_inputs import InputTracker, SharedInput
from galore_torch.lowbit import QuantizedWeight
from galore_torch.modes import SaveInputs
from galore_torch.optim.galore import GaLore
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.state_keys import STEP
from galore_torch.optim.trained_weight import TrainedWeight
from galore_torch.projection import Basis, Projection
from galore_torch.random_bits import key_of

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


class FusedLinear:
    """What replaces the forward of one linear layer while it is attached.

    Args:
        module: the layer.
        optimizer: holds its weight, projected.
        tracker: who shares an input with whom; one object for all layers of a model.
        save_inputs: what is saved of inputs, see `attach`.
    """

    def __init__(self, module: nn.Linear, optimizer: GaLore, tracker: InputTracker, save_inputs: SaveInputs) -> None:
        self.module = module
        self.optimizer = optimizer
        self.tracker = tracker
        self.save_inputs = save_inputs
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

    def width(self, version: int) -> float:
        """Numbers a token that this layer saves, if its backward can do with fewer than X has; else 0.

        Args:
            version: of what is known of weights.
        """
        if not isinstance(self.module.weight, nn.Parameter):
            return 0
        trained, basis = self._look(version)
        if basis is None or self.save_inputs == "full":
            return 0
        rank = next((mode.rank for mode in trained.projection.modes if mode.name == "right"), None)
        if rank is not None:
            return rank
        return self.module.in_features / SAMPLED if self.save_inputs == "sampled" else 0

    def _planned(self, weight: Tensor) -> Plan | None:
        """What to do from now on; None for a weight that is not projected, as of a tied layer.

        The first layer of a pass looks for what a user may have changed, in all weights.
        """
        optimizer, tracker = self.optimizer, self.tracker
        if tracker.first is self or tracker.version != optimizer._cache.version:
            optimizer._checked_weights()
            tracker.first, tracker.version = self, optimizer._cache.version
        version = optimizer._cache.version
        trained, basis = self._look(version)
        if not trained.projection.modes:
            return None
        step = trained.state[STEP]
        # What to save is decided once a step, by what the steps before have shown: a recomputed forward decides the
        # same. But a checkpoint that is loaded in between may take the basis away.
        if self._decided is None or self._decided[0] != step:
            self._decided = step, self.shared.saves_parts(version)
        saves_part, tokens = self._decided[1] and basis is not None, None
        if self.save_inputs == "sampled" and basis is not None and "right" not in basis:
            tokens = slice(key_of(trained.seed, trained.index, step) % SAMPLED, None, SAMPLED)
        in_codes = isinstance(weight, QuantizedWeight)
        self._plan = Plan(version, weight, trained.projection, basis, saves_part, tokens, in_codes)
        return self._plan

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's forward."""
        parameters = self.module._parameters  # what the layer's attributes look into, too
        weight: Tensor | None
        bias: Tensor | None
        try:
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:  # computed from other parameters by now, as by pruning
            weight, bias = self.module.weight, self.module.bias
        assert weight is not None
        if not (torch.is_grad_enabled() and weight.requires_grad) or _is_transformed():
            return F.linear(x, weight, bias)
        plan, tracker = self._plan, self.tracker
        if (
            plan is None
            or plan.version != self.optimizer._cache.version
            or plan.weight is not weight
            or tracker.first is self
        ):
            plan = self._planned(weight) if isinstance(weight, nn.Parameter) else None
            if plan is None:
                return F.linear(x, weight, bias)
        tracker.record_call(self, x)
        return in_autocast(_linear, x, weight, bias, plan)

    def holds(self, weight: Tensor) -> bool:
        """See `compiled_linear.Layer`."""
        return self.module._parameters.get("weight") is weight

    @torch.no_grad()
    def gradient(self, weight: Tensor, grad_y_nm: Tensor, x_nn: Tensor) -> Tensor:
        """See `compiled_linear.Layer`."""
        trained = self.tracker.known.in_backward(weight)
        assert trained is not None
        basis = trained.basis if trained.projection.modes and not trained.needs_renewal else None
        plan = Plan(self.optimizer._cache.version, weight, trained.projection, basis, False, None, False)
        return _weight_gradient(plan, grad_y_nm, x_nn, weight.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled module is a plain layer: the hooks stay behind, and so does this."""
        return type(None), ()


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
            grad_weight = _weight_gradient(plan, grad_y_nm, _rows(kept), weight.dtype)
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
            grad_weight = _weight_gradient(plan, _rows(grad_y), _rows(kept), weight.dtype)
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


_linear: Callable[[Tensor, Tensor, Tensor | None, Plan], Tensor] = super(torch.autograd.Function, _Linear).apply
"""`_Linear.apply` without its question for torch.func's transforms, which takes as long as the rest."""


def _is_transformed() -> bool:
    """Whether derivatives are those of torch.func or in forward mode, which know no projected gradients."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


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


def _weight_gradient(plan: Plan, grad_y_nm: Tensor, kept_nn: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient dW = dY^T X, or with a basis the projected gradient."""
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


_LAYER = "_galore_fused"
"""The attribute of a module that holds what runs in its forward's place."""

_IN_GRAPH = "_galore_in_graph"
"""That which tells whether a compiler may put it into its graph, where the whole input is saved."""


def forward(module: nn.Linear, x: Tensor) -> Tensor:
    """That of all fused layers: one function, so that a compiler takes equal layers for the same.

    Its name is that of the method in whose place it is: by that a pickled module finds the method that it had.
    """
    if torch.compiler.is_compiling():
        in_graph = module.__dict__[_IN_GRAPH] and not isinstance(module.weight, QuantizedWeight)
        return compiled_linear(module, x) if in_graph else _not_compiled(module, x)
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
    setattr(module, _IN_GRAPH, layer.save_inputs != "sampled")
    key = id(module.weight)
    LAYERS[key] = layer

    def restore() -> None:
        del module.forward
        delattr(module, _LAYER)
        delattr(module, _IN_GRAPH)
        LAYERS.pop(key, None)

    return restore
