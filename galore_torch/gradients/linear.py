"""`FusedLinear`: a linear layer of a model whose backward computes the projected gradient, see `projected_linear`.

What it does in a pass is planned once a step: whether its basis is to be renewed, and what is saved of its input.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from galore_torch.gradients.compiled_linear import LAYERS, compiled_linear, in_autocast
from galore_torch.gradients.projected_linear import SAMPLED, Plan, projected_linear, weight_gradient
from galore_torch.gradients.shared_inputs import InputTracker, SharedInput
from galore_torch.lowbit import QuantizedWeight
from galore_torch.modes import SaveInputs
from galore_torch.optim.galore import GaLore
from galore_torch.optim.state_keys import STEP
from galore_torch.optim.trained_weight import TrainedWeight
from galore_torch.projection import Basis
from galore_torch.random_bits import key_of


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
        tracker.layers.append(self)
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

    def plan_again(self) -> None:
        """Plans for the weight of the last plan, where that is the layer's and the optimizer's still."""
        plan = self._plan
        if plan is None or self.module._parameters.get("weight") is not plan.weight:
            return
        if self.optimizer._cache.known(plan.weight) is not None:
            self._make_plan(plan.weight)

    def _make_plan(self, weight: Tensor) -> Plan | None:
        """What to do from now on; None for a weight that is not projected, as of a tied layer."""
        version = self.optimizer._cache.version
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
        cache, tracker = self.optimizer._cache, self.tracker
        if tracker.first is self or tracker.version != cache.version:
            tracker.begin_pass(self)
        plan = self._plan
        if plan is None or plan.version != cache.version or plan.weight is not weight:
            plan = self._make_plan(weight) if isinstance(weight, nn.Parameter) else None
            if plan is None:
                return F.linear(x, weight, bias)
        tracker.record_call(self, x)
        return in_autocast(projected_linear, x, weight, bias, plan)

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
        return weight_gradient(plan, grad_y_nm, x_nn, weight.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled module is a plain layer: the hooks stay behind, and so does this."""
        return type(None), ()


def _is_transformed() -> bool:
    """Whether derivatives are those of torch.func or in forward mode, which know no projected gradients."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


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
