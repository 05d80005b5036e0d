"""Under FSDP2, gradients that are projected before `step()`: they are averaged in low rank, and cut as the weight is.

A layer's backward sees its weight whole, and a hook there takes the gradient away from FSDP2 once it is complete:
projected with the whole basis, it is reduced to this process' part (or summed, where the projected axis is cut), which
becomes the shard's gradient. A weight that renews in this step leaves its full gradient to FSDP2.

Hooks hold the model and the optimizer weakly: see `gradients/hooks.py`.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from galore_torch.distributed.buckets import drop_empty
from galore_torch.distributed.sharded import ShardedWork, Shards
from galore_torch.gradients.data_parallel import Hook
from galore_torch.optim.galore import GaLore
from galore_torch.optim.processes import is_sharded
from galore_torch.optim.projected_gradient import ProjectedGradient

IN_FLIGHT = 8
"""Projected gradients whose averages may be on their way: what of them is whole is small, and others overlap."""

_current_backward = torch._C._current_graph_task_id


@dataclass
class _Average:
    """A projected gradient on its way."""

    trained: ShardedWork
    part: Tensor
    handle: Any
    divisor: float

    def arrived(self) -> DTensor:
        """This process' part, with the others' to it."""
        self.handle.wait()
        cut, shape = self.trained.cut, self.trained.projection.projected_shape
        for dimension in range(cut.mesh.ndim):
            if dimension != cut.dimension:  # replicas of shards
                dist.all_reduce(self.part, group=cut.mesh.get_group(dimension))
        weight = self.trained.weight
        part = self.part.div_(self.divisor).to(weight.device, weight.dtype).contiguous()  # as the rule's state is
        if self.trained.is_contracted:
            return DTensor.from_local(part, cut.mesh, [Replicate()] * cut.mesh.ndim, run_check=False)
        return cut.wrap(part, shape)


class ShardTraffic:
    """What one attached model sends and receives. See `gradients/data_parallel.py` for the hooks that it makes.

    Args:
        model: the model, after it was sharded.
        optimizer: holds the shards.
        weights: the projected ones, by name.
        applies: whether gradients are applied in the backward.

    Raises:
        ValueError: some of the weights are sharded and others not.
    """

    def __init__(self, model: nn.Module, optimizer: GaLore, weights: Mapping[str, Tensor], applies: bool) -> None:
        whole = next((name for name, weight in weights.items() if not is_sharded(weight)), None)
        if whole is not None:
            raise ValueError(
                f"{whole} is not sharded, and other projected weights are: shard all of the model (fully_shard(model) "
                'last), or use attach(..., gradients="full", update="step")'
            )
        self._optimizer = weakref.ref(optimizer)
        optimizer._trained_weight(next(iter(weights.values())))  # so that it knows of the processes
        self._projected = {id(weight) for weight in weights.values()}
        self._applies = applies
        self._handles: list[Any] = []
        self._hooked: set[int] = set()
        self._kept: dict[int, Tensor] = {}
        self._on_their_way: deque[_Average] = deque()
        self._backward: int | None = None
        self._synchronizes = True
        self._form: Hook | None = None
        self._apply: Hook | None = None
        for module in model.modules():
            if isinstance(module, FSDPModule):
                self._handles.append(module.register_forward_pre_hook(self._before_forward))

    def remove(self) -> None:
        """Ends it."""
        while self._handles:
            self._handles.pop().remove()
        self._kept.clear()

    def takes(self, weight: Tensor) -> bool:
        """See `data_parallel.Traffic`."""
        return id(weight) in self._projected

    def arrives(self, local: Hook) -> Hook:
        """See `data_parallel.Traffic`. Nothing arrives at a shard in the backward."""
        return local

    def leaves(self, apply: Hook) -> Hook:
        """See `data_parallel.Traffic`."""
        return apply

    def completes(self, form: Hook, apply: Hook | None) -> Hook:
        """See `data_parallel.Traffic`. FSDP2 runs the hooks of a shard when it has averaged a full gradient."""
        self._form, self._apply = form, apply
        return apply or (lambda _: None)

    def _before_forward(self, module: nn.Module, _: Any) -> None:
        """Hooks on the weights as the layers see them, which exist from the first forward pass on."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        self._backward = None  # one that ended in an error is over
        whole = optimizer._processes.whole_weights
        for group in module._get_fsdp_state()._fsdp_param_groups:  # type: ignore[operator]
            for one in group.fsdp_params:
                unsharded = getattr(one, "_unsharded_param", None)
                if unsharded is None or id(one) in self._hooked:
                    continue
                self._hooked.add(id(one))
                whole[unsharded] = one.sharded_param
                complete = self._completes(one, group)
                self._handles.append(unsharded.register_post_accumulate_grad_hook(complete))

    def _completes(self, of_fsdp: Any, group: Any) -> Hook:
        """What is done when the gradient of a weight is complete in this process."""
        is_projected = id(of_fsdp.sharded_param) in self._projected

        @torch.no_grad()
        def complete(unsharded: Tensor) -> None:
            optimizer = self._optimizer()
            if optimizer is None:
                return
            self._synchronizes = group.reduce_grads and group.all_reduce_grads
            self._begin(optimizer)
            if not is_projected:
                return
            trained = optimizer._trained_weight(of_fsdp.sharded_param)
            assert isinstance(trained, ShardedWork)
            image = _projected(unsharded.grad, trained)
            if image is None:
                return
            unsharded.grad = None  # so that FSDP2 passes it by
            kept = self._kept.pop(id(unsharded), None)
            if kept is not None:
                image = kept.add_(image)
            if not self._synchronizes:
                self._kept[id(unsharded)] = image
                return
            self._on_their_way.append(_send(image, trained, of_fsdp.reduce_dtype, group.gradient_divide_factor))
            while len(self._on_their_way) > IN_FLIGHT:
                self._take(self._on_their_way.popleft())

        return complete

    def _begin(self, optimizer: GaLore) -> None:
        """The first gradient of a backward pass is complete."""
        backward = _current_backward()
        if self._backward == backward:
            return
        if self._applies and not self._synchronizes:
            raise ValueError(
                "set_requires_gradient_sync(False) accumulates gradients, and update='backward' applies each; use "
                "update='step'"
            )
        self._backward = backward
        self._on_their_way.clear()
        optimizer._processes.require(optimizer._settings["seed"])
        held = [weight for group in optimizer.param_groups for weight in group["params"] if self.takes(weight)]
        trained = [optimizer._trained_weight(weight) for weight in held]
        assert isinstance(optimizer._processes, Shards)
        drop_empty(trained, optimizer._processes.group)
        torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _take(self, average: _Average) -> None:
        trained, projected = average.trained, average.arrived()
        weight, grad = trained.weight, trained.weight.grad
        if isinstance(grad, DTensor):  # a full one, of before the last step
            projected.to_local().add_(trained.project(trained.grad))
            trained.drop_factors()
            grad = weight.grad = None
        if grad is None:
            weight.grad = ProjectedGradient(projected, trained.projection, trained.basis, weight.dtype)
        elif isinstance(grad, ProjectedGradient):
            grad.projected.add_(projected.to(grad.projected.dtype))
        else:
            grad.add_(projected)  # it has been applied: says so
        if self._apply is not None:
            self._apply(weight)
        elif self._form is not None:
            self._form(weight)

    @torch.no_grad()
    def _finish(self) -> None:
        """The end of the backward pass, after FSDP2's own."""
        self._backward = None
        while self._on_their_way:
            self._take(self._on_their_way.popleft())


def _projected(grad: Tensor | None, trained: ShardedWork) -> Tensor | None:
    """The projection of a whole gradient; None if FSDP2 is to average the full one, to renew the basis from."""
    if isinstance(grad, ProjectedGradient):
        return grad.projected
    if grad is None or trained.needs_renewal:
        return None
    factors = {name: factor.to(grad.dtype) for name, factor in trained.basis.items()}
    return trained.projection.project(grad, factors)


def _send(image: Tensor, trained: ShardedWork, dtype: torch.dtype | None, divisor: float | None) -> _Average:
    """Begins to add up a projected gradient over processes."""
    cut = trained.cut
    image = image.to(dtype or image.dtype)
    divisor = divisor or cut.mesh.size()
    if trained.is_contracted or cut.is_whole:
        handle = dist.all_reduce(image, group=cut.group, async_op=True)
        return _Average(trained, image, handle, divisor)
    part, handle = cut.reduce(image)
    return _Average(trained, part, handle, divisor)
