"""Under DDP: it leaves projected weights out, and their gradients are averaged in low rank.

Projected gradients are averaged in buckets from hooks, while the backward goes on. A weight that renews in this step
sends its full gradient once, or a sketch of it and its projection; one that has no basis yet gets it at once, from the
average. The idea of compressing the same way on all processes is PowerSGD's (arXiv 1905.13727); here it is what the
optimizer needs, and nothing is lost.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from galore_torch.distributed.processes import LocalReplicas, Replicas, Together
from galore_torch.distributed.traffic import Bucket, Kind, Traffic, grad_or_zeros
from galore_torch.gradients.data_parallel import Hook
from galore_torch.gradients.known_weights import current_backward
from galore_torch.lowbit import QuantizedWeight
from galore_torch.optim.galore import GaLore
from galore_torch.optim.processes import Alone
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.state_keys import RENEWALS, STEP
from galore_torch.optim.trained_weight import TrainedWeight

FIRST_BUCKET_BYTES = 2**20
"""What the first bucket holds at most, as DDP's own does by default: sending begins while the backward goes on."""

_TRAFFIC: weakref.WeakKeyDictionary[nn.Module, ReplicaTraffic] = weakref.WeakKeyDictionary()
"""By the model. Its hooks are plain functions that look here: a copy of it is a plain model."""


class _LeftOut(set[str]):
    """Names that a copy of the model does not take along: it is a plain model, of which DDP averages everything."""

    def __deepcopy__(self, memo: Any) -> set[str]:
        return set()

    def __reduce__(self) -> tuple[Any, ...]:
        return set, ()


class ReplicaTraffic(Traffic):
    """That of a model inside DDP.

    Args:
        model: the model, before it is wrapped.
        optimizer: holds its weights.
        weights: those whose gradients are projected before `step()`, by name. DDP must have one at least: if these are
            all that is trained, the smallest stays with it.
        dtype: in which projected gradients accumulate; the weight's when None.
        applies: whether gradients are applied in the backward.
        average_every: steps between two averages of projected weights; 1 averages gradients.

    Attributes:
        is_on: whether the last forward pass was one of DDP's, or the backward that is running is of one.

    Raises:
        ValueError: the model is wrapped already, and has such weights.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: GaLore,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype | None,
        applies: bool,
        average_every: int,
    ) -> None:
        if weights and any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            raise ValueError(
                "the model is wrapped in DistributedDataParallel already, which then averages full gradients. Call "
                "attach(model, optimizer) first and DistributedDataParallel(model) after it, or use attach(..., "
                'gradients="full", update="step")'
            )
        root = model.module if isinstance(model, DistributedDataParallel) else model
        super().__init__(optimizer, reversed(_leave_out(root, weights)), applies)  # about as the backward goes
        self.is_on = False
        self._dtype, self._every, self._bucket_bytes = dtype, average_every, 0
        if average_every > 1:
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        self._wrapper: Any = lambda: None
        self._waiting: deque[Bucket] = deque()
        self._of_weight: dict[int, tuple[Bucket, TrainedWeight]] = {}
        if root not in _TRAFFIC:
            root.register_forward_pre_hook(_before_forward)
            root.register_forward_hook(_after_forward)
        _TRAFFIC[root] = self

    def remove(self) -> None:
        """Ends it. The model can go on outside DDP, or be wrapped anew."""
        super().remove()
        self.enter(None)
        self._part()
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
        self._backward, self._of_weight = None, {}  # one that ended in an error is over
        optimizer = self._optimizer()
        self.is_on = wrapper is not None and optimizer is not None
        if optimizer is None:
            return
        if wrapper is None:
            held = (weight for group in optimizer.param_groups for weight in group["params"])
            if all(weight.grad is None for weight in held):  # else all make the step that they wait for
                self._part()
            return
        if self._together is None or self._wrapper() is not wrapper:
            self._together = self._meet(wrapper, optimizer)
            self._wrapper = weakref.ref(wrapper)
        self._synchronizes, self._bucket_bytes = wrapper.require_backward_grad_sync, wrapper.bucket_bytes_cap
        optimizer._processes = self._together

    def _part(self) -> None:
        """Has the optimizer step by itself."""
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._processes is self._together:
            optimizer._processes = Alone()

    def _meet(self, wrapper: DistributedDataParallel, optimizer: GaLore) -> Together:
        """The first forward pass in a wrapper: all agree, and begin from the first one's weights."""
        if self._weights and (wrapper._join_config.enable or wrapper.mixed_precision is not None):
            raise ValueError(
                "DistributedDataParallel's join() and mixed_precision act on full gradients; leave them out (drop the "
                'last, uneven batches; use torch.autocast), or use attach(..., gradients="full", update="step")'
            )
        if self._every > 1 and any(isinstance(weight, QuantizedWeight) for weight in self.weights()):
            raise ValueError(f"average_every is {self._every}, and weights in INT8 cannot be averaged; use 1")
        group = _beside(wrapper.process_group) if self._together is None else self._together.group
        kind = Replicas if self._every == 1 else LocalReplicas
        together = kind(optimizer, group, dtype=self._dtype, update=self._applies, average_every=self._every)
        together.require(optimizer._settings["seed"])
        for weight in self.weights():  # DDP leaves these out of its own broadcast
            tensors = (weight.codes, weight.scale) if isinstance(weight, QuantizedWeight) else (weight.data,)
            for tensor in tensors:
                dist.broadcast(tensor, group_src=0, group=group)
        return together

    # Backward --------------------------------------------------------------------------------------------------------

    def takes(self, weight: Tensor) -> bool:
        """See `data_parallel.Traffic`."""
        return not self._weights or super().takes(weight)

    def arrives(self, local: Hook) -> Hook:
        """See `data_parallel.Traffic`."""
        return lambda grad: self.begin() if self.is_on else local(grad)

    def leaves(self, apply: Hook) -> Hook:
        """See `data_parallel.Traffic`."""
        return lambda weight: None if self.is_on else apply(weight)

    def completes(self, form: Hook, apply: Hook | None) -> Hook:
        """See `data_parallel.Traffic`."""
        self._form, self._keep = form, apply or form
        return self._complete

    def _kind(self, one: TrainedWeight) -> Kind | None:
        """What of a weight's gradient is sent in this pass; None where it only accumulates."""
        is_full = not isinstance(one.weight.grad, ProjectedGradient)
        if is_full and self._every == 1 and one.renews_from_sketch and (self._synchronizes or one.completes_basis):
            return "sketch"
        if is_full and one.completes_basis and not self._applies:
            return "full"
        return "gradient" if self._synchronizes and (self._every == 1 or one.needs_renewal) else None

    def _plan(self, trained: list[TrainedWeight]) -> None:
        """Lets weights of one kind share a bucket while it has room: of DDP's bytes, or of one basis a process."""
        bases = dist.get_world_size(self._together.group)
        self._waiting, self._of_weight = deque(), {}
        self.is_on = True  # the model may have run by itself since
        before: Any = None
        room, bucket_bytes = 0, min(FIRST_BUCKET_BYTES, self._bucket_bytes)
        for one in trained:
            kind, weight = self._kind(one), one.weight
            if kind is None:
                continue
            dtype = torch.promote_types(weight.dtype, self._dtype or weight.dtype)
            size = dtype.itemsize * (weight.numel() if one.needs_renewal else one.coordinate_count)
            size = size if kind == "gradient" else 1
            if before != (kind, dtype, weight.device) or size > room:
                before = kind, dtype, weight.device
                room = bucket_bytes if kind == "gradient" else bases
                bucket_bytes = self._bucket_bytes
                self._waiting.append(Bucket(kind, dtype))
            room -= size
            self._waiting[-1].add(one)
            self._of_weight[id(weight)] = self._waiting[-1], one

    @torch.no_grad()
    def _complete(self, weight: Tensor) -> None:
        if self.is_on:
            self.begin()
            if weight.grad is not None and weight.grad.requires_grad:
                raise ValueError("create_graph=True is not supported inside DistributedDataParallel; leave it out")
        if id(weight) not in self._of_weight:
            self._keep(weight)  # outside DDP; of micro-batches before the last, or of steps between two averages
            return
        bucket, one = self._of_weight[id(weight)]
        if bucket.handle is not None:
            raise ValueError(
                "a gradient arrives twice in one backward pass, and its first part has been sent already (a weight in "
                "several re-entrant checkpoints?); use use_reentrant=False"
            )
        if bucket.kind == "gradient" and (isinstance(weight.grad, ProjectedGradient) or not one.needs_renewal):
            self._form(weight)
        bucket.waits_for.discard(id(weight))
        while self._waiting and not self._waiting[0].waits_for:
            self._reduce(self._waiting.popleft())

    def _reduce(self, bucket: Bucket) -> None:
        bucket.reduce(self._together.group)
        if bucket.kind == "gradient":
            self._send(bucket)
        else:
            self._find(bucket)

    def _find(self, bucket: Bucket) -> None:
        """Finds bases from averages: of full gradients, which have arrived with them, or of sketches of these.

        Where sketches have told, what the bases hold of the gradients is sent; all of one that has none.
        """
        averages = [(one, average.to(one.weight.dtype)) for one, average in bucket.averages()]
        bases = self._together.bases([one for one, _ in averages], [average for _, average in averages])
        for one, average in averages if bucket.kind == "full" and self._synchronizes else ():
            one.weight.grad = average
        for (one, _), basis in zip(averages, bases, strict=True):
            if basis is not None:
                one.weight.grad = ProjectedGradient.of(grad_or_zeros(one), one.projection, basis)
                self._form(one.weight)
        if averages and bucket.kind == "sketch" and self._synchronizes:
            sent = Bucket("gradient", bucket.dtype, trained=[one for one, _ in averages])
            sent.reduce(self._together.group)
            self._send(sent)

    def _take(self, sent: Bucket) -> None:
        for one, average in sent.averages():
            grad, weight = one.weight.grad, one.weight
            if isinstance(grad, ProjectedGradient):
                grad.projected = average.to(grad.projected.dtype)
            elif grad is not None or tuple(average.shape) != one.projection.projected_shape or one.needs_renewal:
                weight.grad = average.to(weight.dtype)
            else:
                weight.grad = ProjectedGradient(average, one.projection, one.basis, weight.dtype)
            if self._applies:
                self._keep(weight)

    @torch.no_grad()
    def _finish(self) -> None:
        """The end of the backward pass: what has no gradient in this process is sent as zeros."""
        while self._waiting:
            self._reduce(self._waiting.popleft())
        super()._finish()
        self._of_weight = {}  # it holds weights
        for weight in self.weights() if self._every > 1 else ():
            if weight.requires_grad and weight.grad is None:  # its step is made as in the others, which may have one
                weight.grad = torch.zeros_like(weight)
                self._keep(weight)

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        if isinstance(optimizer._processes, LocalReplicas):
            held = [optimizer._trained_weight(weight) for weight in self.weights()]
            optimizer._processes.average(
                [one for one in held if one.state[RENEWALS] and one.state[STEP] % self._every == 0]
            )


def _before_forward(module: nn.Module, _: Any) -> None:
    wrapper = DistributedDataParallel._active_ddp_module
    if not torch.is_grad_enabled() or current_backward() != -1:
        return  # no backward comes of it, or it is one's own
    traffic = _TRAFFIC.get(module)
    if wrapper is not None:
        _require_left_out(wrapper, {id(weight) for weight in (traffic.weights() if traffic else ())})
    if traffic is not None:
        traffic.enter(wrapper)


def _after_forward(module: nn.Module, _: Any, output: Any) -> None:
    traffic = _TRAFFIC.get(module)
    if traffic is None or not traffic.is_on or not torch.is_grad_enabled():
        return
    for one in tree_leaves(output):
        if isinstance(one, Tensor) and one.requires_grad:
            one.register_hook(lambda _, traffic=traffic: traffic.begin(anew=True))  # type: ignore[no-untyped-call]


def _beside(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Another group of the same processes, which never interleaves with theirs, with the same time limit.

    torch would give it its own limit, of half an hour.
    """
    known = getattr(group._get_backend(next(iter(group._device_types))), "options", None)
    limit = getattr(known, "_timeout", None)  # a backend of others may not say
    ranks = dist.get_process_group_ranks(group)
    made: dist.ProcessGroup = dist.new_group(ranks, timeout=limit, use_local_synchronization=True)
    return made


def _leave_out(model: nn.Module, weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Has DDP leave weights out when it is wrapped around a model; all but the smallest if there are no others."""
    ours = {id(weight): weight for weight in weights.values()}
    if ours and not any(weight.requires_grad and id(weight) not in ours for weight in model.parameters()):
        del ours[min(ours, key=lambda key: ours[key].numel())]
    names = {name for name, weight in model.named_parameters(remove_duplicate=False) if id(weight) in ours}
    if names:
        # DDP also looks for f"{module}.{name}", which begins with a dot for what is the root's own.
        told = _LeftOut({*names, *(f".{name}" for name in names)})
        told |= set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, told)  # type: ignore[no-untyped-call]
    return list(ours.values())


def _require_left_out(wrapper: DistributedDataParallel, ours: set[int]) -> None:
    """Checks that DDP averages all weights but those that are averaged here, which are told by their identities."""
    ignored = wrapper.parameters_to_ignore
    for name, weight in wrapper.module.named_parameters(remove_duplicate=False):
        if id(weight) in ours and name not in ignored:
            raise ValueError(
                f"DistributedDataParallel averages the full gradient of {name}, and attach(...) its projected one. "
                "Attach the very model that is wrapped, before it is wrapped"
            )
        if f".{name}" in ignored and id(weight) not in ours and weight.requires_grad:
            raise ValueError(
                f"DistributedDataParallel leaves {name} out, since attach(...) was to average its projected gradient "
                "and has been removed: the processes would drift apart. Wrap the model anew"
            )
