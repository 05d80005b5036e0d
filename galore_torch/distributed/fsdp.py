"""Under FSDP2, gradients that are projected before `step()`: they are averaged in low rank, and cut as the weight is.

A layer's backward sees its weight whole, and a hook there takes the gradient away from FSDP2 once it is complete:
projected with the whole basis, it is reduced to this process' part (or summed, where the projected axis is cut), which
becomes the shard's gradient. A weight that renews in this step leaves its full gradient to FSDP2, unless a sketch of it
is enough: then the weights of a layer that renew send sketches, once all of them have come, and gradients in new bases.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from galore_torch.distributed.sharded import ShardedWork
from galore_torch.distributed.traffic import Traffic
from galore_torch.gradients.data_parallel import Hook
from galore_torch.gradients.known_weights import current_backward
from galore_torch.optim.galore import GaLore
from galore_torch.optim.processes import is_sharded
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.trained_weight import TrainedWeight
from galore_torch.projection import Basis


class ShardTraffic(Traffic):
    """That of a model that is sharded.

    Args:
        model: the model, after it was sharded.
        optimizer: holds the shards.
        weights: the projected ones, by name.
        applies: whether gradients are applied in the backward.

    Raises:
        ValueError: some of the weights are sharded and others not.
    """

    def __init__(self, model: nn.Module, optimizer: GaLore, weights: Mapping[str, Tensor], applies: bool) -> None:
        not_sharded = next((name for name, weight in weights.items() if not is_sharded(weight)), None)
        if not_sharded is not None:
            raise ValueError(
                f"{not_sharded} is not sharded, and other projected weights are: shard all of the model "
                '(fully_shard(model) last), or use attach(..., gradients="full", update="step")'
            )
        super().__init__(optimizer, weights.values(), applies)
        optimizer._trained_weight(next(iter(weights.values())))  # so that it knows of the processes
        self._hooked: set[int] = set()
        self._kept: dict[int, Tensor] = {}
        self._arrived: dict[int, list[Any]] = {}  # by FSDP2's groups of weights, those that wait to renew from sketches
        for module in model.modules():
            if isinstance(module, FSDPModule):
                self._handles.append(module.register_forward_pre_hook(self._before_forward))

    def completes(self, form: Hook, apply: Hook | None) -> Hook:
        """See `data_parallel.Traffic`. FSDP2 runs the hooks of a shard when it has averaged a full gradient."""
        self._keep = apply or form
        return apply or (lambda _: None)

    def _before_forward(self, module: nn.Module, _: Any) -> None:
        """Hooks on the weights as the layers see them, which exist from the first forward pass on."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if current_backward() == -1:  # or it is a checkpointed layer's, inside a backward pass
            self._backward = None  # one that ended in an error is over
        for group in _groups_of(module):
            for one in group.fsdp_params:
                unsharded = getattr(one, "_unsharded_param", None)
                if unsharded is not None and unsharded.requires_grad and id(one) not in self._hooked:
                    self._hooked.add(id(one))
                    optimizer._processes.whole_weights[unsharded] = one.sharded_param
                    hook = self._completes(one, group)
                    self._handles.append(unsharded.register_post_accumulate_grad_hook(hook))

    def _completes(self, of_fsdp: Any, group: Any) -> Hook:
        """What is done when the gradient of a weight is complete in this process."""
        is_projected = self.takes(of_fsdp.sharded_param)
        # Held weakly: the garbage collector does not look into the hooks of a tensor that C++ holds too, and one that
        # held what holds its own weight would keep all of the model alive.
        one, its_group = weakref.ref(of_fsdp), weakref.ref(group)

        @torch.no_grad()
        def complete(unsharded: Tensor) -> None:
            optimizer, of_fsdp, group = self._optimizer(), one(), its_group()
            if optimizer is None or of_fsdp is None or group is None:
                return
            self._synchronizes = group.reduce_grads and group.all_reduce_grads
            self.begin()
            if not is_projected:
                return
            held, trained = of_fsdp.sharded_param.grad, optimizer._trained_weight(of_fsdp.sharded_param)
            assert isinstance(trained, ShardedWork)
            basis = held.basis if isinstance(held, ProjectedGradient) else trained.basis
            if isinstance(unsharded.grad, ProjectedGradient):
                projected = unsharded.grad.projected
            elif unsharded.grad is None:
                return
            elif trained.needs_renewal and not (isinstance(held, ProjectedGradient) and trained.renews_from_sketch):
                if self._synchronizes and held is None and trained.renews_from_sketch:
                    self._arrives(of_fsdp, group)
                return  # FSDP2 is to average the full one, to renew the basis from
            else:
                factors = {name: factor.to(unsharded.dtype) for name, factor in basis.items()}
                projected = trained.projection.project(unsharded.grad, factors)
            unsharded.grad = None  # so that FSDP2 passes it by
            if id(unsharded) in self._kept:
                projected = self._kept.pop(id(unsharded)).add_(projected)
            if not self._synchronizes:
                self._kept[id(unsharded)] = projected
                return
            self._reduce(of_fsdp, group, trained, projected, basis)

        return complete

    def _plan(self, trained: list[TrainedWeight]) -> None:  # noqa: ARG002
        self._arrived = {}

    def _arrives(self, of_fsdp: Any, group: Any) -> None:
        """Renews the weights of a group once the last of those has come that renew from sketches.

        A basis is found from an averaged sketch, and what it holds of the gradient is sent. The gradient of a weight
        that gets none is left to FSDP2, and so are all, if one of the group has none in this pass.
        """
        optimizer: Any = self._optimizer()
        arrived = self._arrived.setdefault(id(group), [])
        arrived.append(of_fsdp)
        ours = [one.sharded_param for one in group.fsdp_params if self.takes(one.sharded_param)]
        waiting = [weight for weight in ours if weight.requires_grad and weight.grad is None]
        if len(arrived) < sum(optimizer._trained_weight(weight).renews_from_sketch for weight in waiting):
            return
        del self._arrived[id(group)]
        renewed: list[ShardedWork] = [optimizer._trained_weight(one.sharded_param) for one in arrived]
        grads = [_complete_grad(one) for one in arrived]
        sums = [one.cut.reduce(one.sketch(grad), for_all=True) for one, grad in zip(renewed, grads, strict=True)]
        averages = [one.to_local() / _divisor(group, trained) for one, trained in zip(sums, renewed, strict=True)]
        bases = optimizer._processes.bases(renewed, averages)
        for one, trained, grad, basis in zip(arrived, renewed, grads, bases, strict=True):
            if basis is not None:
                one.unsharded_param.grad = one.unsharded_accumulated_grad = None
                self._reduce(one, group, trained, trained.projection.project(grad, basis), basis)

    def _reduce(self, of_fsdp: Any, group: Any, trained: ShardedWork, projected: Tensor, basis: Basis) -> None:
        """Begins to average a projected gradient."""
        total = trained.cut.reduce(projected.to(of_fsdp.reduce_dtype or projected.dtype))
        self._send((trained, total, _divisor(group, trained), basis))

    def _take(self, sent: tuple[ShardedWork, DTensor, float, Basis]) -> None:
        trained, total, divisor, basis = sent
        weight, grad = trained.weight, trained.weight.grad
        part = (total._local_tensor / divisor).to(weight.device, weight.dtype).contiguous()  # as the rule's state is
        if isinstance(grad, DTensor):  # a full one, of before the last step
            part.add_(trained.project(trained.grad))
            trained.drop_factors()
            grad = None
        spec = total._spec
        projected = DTensor.from_local(
            part, spec.mesh, spec.placements, run_check=False, shape=total.shape, stride=total.stride()
        )
        if grad is None:
            weight.grad = ProjectedGradient(projected, trained.projection, basis, weight.dtype)
        elif isinstance(grad, ProjectedGradient):
            grad.projected.add_(projected.to(grad.projected.dtype))
        else:
            grad.add_(projected)  # it has been applied: says so
        self._keep(weight)


def _groups_of(module: nn.Module) -> list[Any]:
    """FSDP2's groups of a module's parameters: torch 2.12 and later have a list of them, earlier ones at most one."""
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [group for group in [state._fsdp_param_group] if group is not None]


def _divisor(group: Any, trained: ShardedWork) -> float:
    """By which FSDP2 divides sums over processes."""
    divisor: float = group.gradient_divide_factor or trained.cut.mesh.size()
    return divisor


def _complete_grad(of_fsdp: Any) -> Tensor:
    """A full gradient with what FSDP2 keeps of the micro-batches before, in the weight's dtype."""
    grad: Tensor = of_fsdp.unsharded_param.grad.to(of_fsdp.sharded_param.dtype)
    before = of_fsdp.unsharded_accumulated_grad
    return grad if before is None else grad + before
