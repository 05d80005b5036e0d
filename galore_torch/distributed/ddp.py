"""Under DDP: it leaves projected weights out, and their gradients are averaged in low rank.

Projected gradients are averaged in buckets from hooks, while the backward goes on, and are in place when `backward()`
returns. A weight that renews in this step sends its full gradient once; one that has no basis yet gets it at once, from
the average. The idea of compressing the same way on all processes is PowerSGD's (arXiv 1905.13727); here what is sent
is what the optimizer needs, and nothing is lost.

Hooks hold the model and the optimizer weakly: see `gradients/hooks.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from galore_torch.distributed.agreement import require_agreement
from galore_torch.distributed.buckets import Bucket, drop_empty, layout, put
from galore_torch.distributed.left_out import leave_out, refuse_what_is_averaged_twice, require_left_out
from galore_torch.distributed.locally import LocalReplicas
from galore_torch.distributed.owners import Replicas, bases_of
from galore_torch.gradients.data_parallel import Hook
from galore_torch.lowbit import QuantizedWeight
from galore_torch.optim.galore import GaLore
from galore_torch.optim.nonfinite import peaks
from galore_torch.optim.processes import Alone
from galore_torch.optim.projected_gradient import ProjectedGradient

BUCKET_BYTES = 25 * 2**20
"""What DDP's buckets hold by default."""

_TRAFFIC: weakref.WeakKeyDictionary[nn.Module, Traffic] = weakref.WeakKeyDictionary()
"""By the model. Its hooks are plain functions that look here: a copy of it is a plain model."""

_current_backward = torch._C._current_graph_task_id


def join(
    model: nn.Module,
    optimizer: GaLore,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    applies: bool,
    average_every: int = 1,
) -> Traffic | None:
    """Prepares a model for DDP.

    Args:
        model: the model, before it is wrapped.
        optimizer: holds its weights.
        weights: those whose gradients are projected before `step()`, by name.
        dtype: in which projected gradients accumulate; the weight's when None.
        applies: whether gradients are applied in the backward.
        average_every: steps between two averages of projected weights; 1 averages gradients.

    Returns:
        Its traffic; None where there is no process group.

    Raises:
        ValueError: the model is wrapped already, and has such weights.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    refuse_what_is_averaged_twice(model, weights)
    root = model.module if isinstance(model, DistributedDataParallel) else model
    traffic = Traffic(optimizer, leave_out(root, weights), dtype, applies, average_every)
    if root not in _TRAFFIC:
        root.register_forward_pre_hook(_before_forward)
        root.register_forward_hook(_after_forward)
    _TRAFFIC[root] = traffic
    return traffic


def _before_forward(module: nn.Module, _: Any) -> None:
    wrapper = DistributedDataParallel._active_ddp_module
    if not torch.is_grad_enabled() or _current_backward() != -1:
        return  # no backward comes of it, or it is one's own
    traffic = _TRAFFIC.get(module)
    if wrapper is not None:
        require_left_out(module, wrapper, () if traffic is None else traffic.weights())
    if traffic is not None:
        traffic.enter(wrapper)


def _after_forward(module: nn.Module, _: Any, output: Any) -> None:
    traffic = _TRAFFIC.get(module)
    if traffic is None or not traffic.is_on or not torch.is_grad_enabled():
        return
    for one in tree_leaves(output):
        if isinstance(one, Tensor) and one.requires_grad:
            one.register_hook(lambda _, traffic=traffic: traffic.begin(anew=True))  # type: ignore[no-untyped-call]


class Traffic:
    """What one attached model sends and receives. See `gradients/data_parallel.py` for the hooks that it makes.

    Args:
        optimizer: holds the weights.
        weights: whose gradients are averaged here.
        dtype: in which projected gradients accumulate; the weight's when None.
        applies: whether gradients are applied in the backward.
        average_every: steps between two averages.

    Attributes:
        is_on: whether the last forward pass was one of DDP's.
    """

    def __init__(
        self, optimizer: GaLore, weights: list[Tensor], dtype: torch.dtype | None, applies: bool, average_every: int
    ) -> None:
        self.is_on = False
        self._optimizer = weakref.ref(optimizer)
        self._weights = [weakref.ref(weight) for weight in reversed(weights)]  # about as the backward goes
        self._dtype, self._applies, self._every = dtype, applies, average_every
        self._after_step = optimizer.register_step_post_hook(self._close) if average_every > 1 else None
        self._group: Any = None
        self._wrapper: Any = lambda: None
        self._synchronizes = True
        self._backward: int | None = None
        self._buckets: list[Bucket] = []
        self._of_weight: dict[int, Bucket] = {}
        self._reduced = self._finished = 0

    def weights(self) -> list[Tensor]:
        """The weights whose gradients are averaged here."""
        return [weight for weight in (one() for one in self._weights) if weight is not None]

    def remove(self) -> None:
        """Ends it. The model can go on outside DDP, or be wrapped anew."""
        if self._after_step is not None:
            self._after_step.remove()
        self.enter(None)
        for model in [model for model, one in _TRAFFIC.items() if one is self]:
            del _TRAFFIC[model]

    # Forward ---------------------------------------------------------------------------------------------------------

    def enter(self, wrapper: DistributedDataParallel | None) -> None:
        """Notes who runs the model, and whether the next backward synchronizes.

        Args:
            wrapper: DDP; None where the model runs by itself.

        Raises:
            ValueError: the processes disagree on the optimizer, or DDP was asked for something that is not supported.
        """
        self._backward = None  # one that ended in an error is over
        optimizer = self._optimizer()
        self.is_on = wrapper is not None and optimizer is not None
        if optimizer is None:
            return
        if wrapper is None:
            if isinstance(optimizer._processes, Replicas):
                optimizer._processes = Alone()
            return
        if self._wrapper() is not wrapper:
            self._meet(wrapper, optimizer)
        self._synchronizes = wrapper.require_backward_grad_sync
        optimizer._processes = Replicas(self._group) if self._every == 1 else LocalReplicas(self._group, self._every)

    def _meet(self, wrapper: DistributedDataParallel, optimizer: GaLore) -> None:
        """The first forward pass in a wrapper: all agree, and begin from the first one's weights."""
        if self._weights and (wrapper._join_config.enable or wrapper.mixed_precision is not None):
            raise ValueError(
                "DistributedDataParallel's join() and mixed_precision act on full gradients; leave them out (drop the "
                'last, uneven batches; use torch.autocast), or use attach(..., gradients="full", update="step")'
            )
        if self._every > 1 and any(isinstance(weight, QuantizedWeight) for weight in self.weights()):
            raise ValueError(f"average_every is {self._every}, and weights in INT8 cannot be averaged; use 1")
        if self._group is None:
            ranks = dist.get_process_group_ranks(wrapper.process_group)
            self._group = dist.new_group(ranks, use_local_synchronization=True)  # never interleaves with DDP's
        choices = {"dtype of projected gradients": self._dtype, "update": self._applies, "average_every": self._every}
        require_agreement(optimizer, choices, self._group)
        for weight in self.weights():  # DDP leaves these out of its own broadcast
            tensors = (weight.codes, weight.scale) if isinstance(weight, QuantizedWeight) else (weight.data,)
            for tensor in tensors:
                dist.broadcast(tensor, group_src=0, group=self._group)
        self._wrapper = weakref.ref(wrapper)

    # Backward --------------------------------------------------------------------------------------------------------

    def takes(self, weight: Tensor) -> bool:
        """See `data_parallel.Traffic`."""
        return not self._weights or any(weight is one for one in self.weights())

    def arrives(self, local: Hook) -> Hook:
        """See `data_parallel.Traffic`."""

        def arrive(grad: Tensor) -> None:
            self.begin() if self.is_on else local(grad)

        return arrive

    def leaves(self, apply: Hook) -> Hook:
        """See `data_parallel.Traffic`."""
        return lambda weight: None if self.is_on else apply(weight)

    def completes(self, form: Hook, apply: Hook | None) -> Hook:
        """See `data_parallel.Traffic`."""
        self._form, self._apply = form, apply

        @torch.no_grad()
        def complete(weight: Tensor) -> None:
            if not self.is_on:
                (apply or form)(weight)
                return
            self.begin()
            self._complete(weight)

        return complete

    @torch.no_grad()
    def begin(self, *, anew: bool = False) -> None:
        """The first gradient of a backward pass comes.

        Args:
            anew: whether it is the model's output's, of which nothing can have come before.
        """
        backward = _current_backward()
        optimizer = self._optimizer()
        # A re-entrant checkpoint has a pass of its own inside: it belongs to the one around it.
        if (
            optimizer is None
            or not self._weights
            or self._backward == backward
            or (self._backward is not None and not anew)
        ):
            return
        if self._applies and not self._synchronizes:
            raise ValueError("no_sync() accumulates gradients, and update='backward' applies each; use update='step'")
        self._backward = backward
        trained = [optimizer._trained_weight(weight) for weight in self.weights() if weight.requires_grad]
        drop_empty(trained, self._group)
        self._buckets = layout(
            trained if self._every == 1 else [one for one in trained if one.needs_renewal],
            most_bytes=BUCKET_BYTES,
            most_fills=0 if self._applies else dist.get_world_size(self._group),
            dtype=self._dtype,
            only_fills=not self._synchronizes,
        )
        self._of_weight = {id(one.weight): bucket for bucket in self._buckets for one in bucket.trained}
        self._reduced = self._finished = 0
        torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _complete(self, weight: Tensor) -> None:
        if weight.grad is not None and weight.grad.requires_grad:
            raise ValueError("create_graph=True is not supported inside DistributedDataParallel; leave it out")
        bucket = self._of_weight.get(id(weight))
        if bucket is None:
            (self._apply or self._form)(weight)  # of micro-batches before the last, or of steps between two averages
            return
        if id(weight) not in bucket.waits_for and bucket in self._buckets[: self._reduced]:
            raise ValueError(
                "a gradient arrives twice in one backward pass, and its first part has been sent already (a weight in "
                "several re-entrant checkpoints?); use use_reentrant=False"
            )
        if not bucket.fills:
            self._form_image(weight)
        bucket.waits_for.discard(id(weight))
        while self._reduced < len(self._buckets) and not self._buckets[self._reduced].waits_for:
            self._reduce_next()

    def _form_image(self, weight: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer and (
            isinstance(weight.grad, ProjectedGradient) or not optimizer._trained_weight(weight).needs_renewal
        ):
            self._form(weight)

    def _reduce_next(self) -> None:
        bucket = self._buckets[self._reduced]
        bucket.reduce(self._group)
        self._reduced += 1
        if bucket.fills:
            self._fill(bucket)
        if self._applies:  # the one before has had time to arrive
            self._finish_until(self._reduced - 1)

    def _fill(self, bucket: Bucket) -> None:
        """Finds first bases, or further directions of these, from the average of full gradients."""
        averages = list(bucket.averages())
        local = [one.weight.grad for one, _ in averages]
        found = peaks([average for _, average in averages]).tolist() if averages else []
        usable = [0 < peak < float("inf") for peak in found]
        for one, average in averages:
            one.weight.grad = average.to(one.weight.dtype)
        told = [one for (one, _), is_usable in zip(averages, usable, strict=True) if is_usable]
        processes = optimizer._processes if (optimizer := self._optimizer()) else None
        if isinstance(processes, Replicas):
            processes.level(told)
        bases = iter(bases_of(told, self._group, lambda one, _: one.grad))
        for (one, average), own, is_usable in zip(averages, local, usable, strict=True):
            basis = next(bases) if is_usable else None
            if not self._synchronizes:
                one.weight.grad = own
            if basis is not None:
                grad = torch.zeros_like(average) if one.weight.grad is None else one.weight.grad
                one.weight.grad = ProjectedGradient.of(grad.to(one.weight.dtype), one.projection, basis)
                self._form(one.weight)

    def _finish_until(self, count: int) -> None:
        while self._finished < count:
            bucket = self._buckets[self._finished]
            self._finished += 1
            if bucket.fills:
                continue
            for one, average in bucket.averages():
                put(one, average)
                if self._apply is not None:
                    self._apply(one.weight)

    @torch.no_grad()
    def _finish(self) -> None:
        """The end of the backward pass: what has no gradient in this process is sent as zeros."""
        while self._reduced < len(self._buckets):
            self._reduce_next()
        self._finish_until(len(self._buckets))
        if self._every > 1:
            self._fill_in_zeros()
        self._backward = None
        self._buckets, self._of_weight = [], {}

    def _fill_in_zeros(self) -> None:
        """Lets weights that this process has not used make their step as in the others, which may have."""
        for weight in self.weights():
            optimizer = self._optimizer()
            if weight.requires_grad and weight.grad is None and optimizer is not None:
                weight.grad = torch.zeros_like(weight)
                (self._apply or self._form)(weight)

    def _close(self, optimizer: Any, *_: Any) -> None:
        if self.is_on and isinstance(optimizer._processes, Replicas):
            optimizer._processes.close([optimizer._trained_weight(weight) for weight in self.weights()])
