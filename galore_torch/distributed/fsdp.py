"""Under FSDP2, gradients that are projected before `step()`: they are averaged in low rank, and cut as the weight is.

A layer's backward sees its weight whole, and a hook there takes the gradient away from FSDP2 once it is complete:
projected with the whole basis, it is reduced to this process' part (or summed, where the projected axis is cut), which
becomes the shard's gradient. A weight that renews in this step leaves its full gradient to FSDP2.
"""

from __future__ import annotations

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
        for group in module._get_fsdp_state()._fsdp_param_groups:  # type: ignore[operator]
            for one in group.fsdp_params:
                unsharded = getattr(one, "_unsharded_param", None)
                if unsharded is not None and id(one) not in self._hooked:
                    self._hooked.add(id(one))
                    optimizer._processes.whole_weights[unsharded] = one.sharded_param
                    hook = self._completes(one, group)
                    self._handles.append(unsharded.register_post_accumulate_grad_hook(hook))

    def _completes(self, of_fsdp: Any, group: Any) -> Hook:
        """What is done when the gradient of a weight is complete in this process."""
        is_projected = self.takes(of_fsdp.sharded_param)

        @torch.no_grad()
        def complete(unsharded: Tensor) -> None:
            optimizer = self._optimizer()
            if optimizer is None:
                return
            self._synchronizes = group.reduce_grads and group.all_reduce_grads
            self.begin()
            if not is_projected:
                return
            trained = optimizer._trained_weight(of_fsdp.sharded_param)
            if isinstance(unsharded.grad, ProjectedGradient):
                projected = unsharded.grad.projected
            elif unsharded.grad is None or trained.needs_renewal:
                return  # FSDP2 is to average the full one, to renew the basis from
            else:
                factors = {name: factor.to(unsharded.dtype) for name, factor in trained.basis.items()}
                projected = trained.projection.project(unsharded.grad, factors)
            unsharded.grad = None  # so that FSDP2 passes it by
            if id(unsharded) in self._kept:
                projected = self._kept.pop(id(unsharded)).add_(projected)
            if not self._synchronizes:
                self._kept[id(unsharded)] = projected
                return
            assert isinstance(trained, ShardedWork)
            projected = projected.to(of_fsdp.reduce_dtype or projected.dtype)
            total = trained.cut.reduce(projected)
            self._send((trained, total, group.gradient_divide_factor or trained.cut.mesh.size()))

        return complete

    def _take(self, sent: tuple[ShardedWork, DTensor, float]) -> None:
        trained, total, divisor = sent
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
            weight.grad = ProjectedGradient(projected, trained.projection, trained.basis, weight.dtype)
        elif isinstance(grad, ProjectedGradient):
            grad.projected.add_(projected.to(grad.projected.dtype))
        else:
            grad.add_(projected)  # it has been applied: says so
        self._keep(weight)
