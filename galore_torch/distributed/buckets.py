"""Gradients that go through one all-reduce: projected ones, and full ones where a basis is due.

All processes hold the same state, and so know alike, before a gradient is there, what each of a bucket's is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.trained_weight import TrainedWeight


@dataclass(eq=False)
class Bucket:
    """Weights whose gradients are averaged in one collective.

    Attributes:
        trained: the weights, of one dtype and device, in the order that all processes know.
        fills: whether their bases are found from these gradients, which are full.
        dtype: in which they are averaged.
        waits_for: the identities of the weights whose gradients are not complete.
        flat: what is reduced: the gradients, and for each whether a process has it.
        shapes: of the gradients.
        handle: of the collective.
    """

    trained: list[TrainedWeight]
    fills: bool
    dtype: torch.dtype
    waits_for: set[int] = field(default_factory=set)
    flat: Tensor | None = None
    shapes: Sequence[tuple[int, ...]] = ()
    handle: Any = None

    def __post_init__(self) -> None:
        self.waits_for = {id(one.weight) for one in self.trained}

    def reduce(self, group: dist.ProcessGroup) -> None:
        """Begins to average the gradients there are; one that is missing counts as zeros.

        Args:
            group: the processes.
        """
        grads = [one.weight.grad for one in self.trained]
        self.shapes = [self._shape(one) for one in self.trained]
        parts = [
            torch.zeros(math.prod(shape), dtype=self.dtype, device=one.weight.device)
            if grad is None
            else _stored(grad).reshape(-1).to(self.dtype)
            for one, grad, shape in zip(self.trained, grads, self.shapes, strict=True)
        ]
        has = torch.tensor([grad is not None for grad in grads], dtype=self.dtype)
        self.flat = torch.cat((*parts, has.to(parts[0].device, non_blocking=True)))
        self.flat.div_(dist.get_world_size(group))
        self.handle = dist.all_reduce(self.flat, group=group, async_op=True)

    def averages(self) -> Iterator[tuple[TrainedWeight, Tensor]]:
        """Waits for the collective.

        Yields:
            Each weight that a process has a gradient of, and the average: of its projected gradient's shape, or of its
            own.
        """
        assert self.flat is not None
        self.handle.wait()
        flat, self.flat, self.handle = self.flat, None, None
        # What this process has, another cannot lack: only a weight that it has not used is asked about.
        has = None
        start = 0
        for place, (one, shape) in enumerate(zip(self.trained, self.shapes, strict=True)):
            part = flat[start : start + math.prod(shape)].view(shape)
            start += part.numel()
            if one.weight.grad is None:
                has = flat[-len(self.trained) :].tolist() if has is None else has
                if has[place] == 0:
                    continue
            yield one, part

    def _shape(self, one: TrainedWeight) -> tuple[int, ...]:
        grad = one.weight.grad
        full = self.fills or one.needs_renewal if grad is None else not isinstance(grad, ProjectedGradient)
        return tuple(one.weight.shape) if full else one.projection.projected_shape


def _stored(grad: Tensor) -> Tensor:
    return grad.projected if isinstance(grad, ProjectedGradient) else grad


def put(one: TrainedWeight, average: Tensor) -> None:
    """Makes an average the gradient of its weight.

    Args:
        one: the weight.
        average: of its projected gradient's shape, or of its own.
    """
    grad, weight = one.weight.grad, one.weight
    if isinstance(grad, ProjectedGradient):
        grad.projected = average.to(grad.projected.dtype)
    elif grad is not None or tuple(average.shape) != one.projection.projected_shape or one.needs_renewal:
        weight.grad = average.to(weight.dtype)
    else:
        weight.grad = ProjectedGradient(average, one.projection, one.basis, weight.dtype)


def layout(
    trained: Iterable[TrainedWeight], *, most_bytes: int, most_fills: int, dtype: torch.dtype | None, only_fills: bool
) -> list[Bucket]:
    """Which weights share a bucket in this backward pass.

    Args:
        trained: all weights, about in the order in which their gradients come.
        most_bytes: of a bucket of more than one weight.
        most_fills: how many weights whose bases are found share a bucket of their own; 0 if these are as others.
        dtype: in which projected gradients accumulate; the weight's when None.
        only_fills: whether nothing else is averaged in this pass.

    Returns:
        The buckets, in the order in which they are reduced.
    """
    buckets: list[Bucket] = []
    kind: Any = None
    room = 0
    for one in trained:
        fills = most_fills > 0 and one.completes_basis and not isinstance(one.weight.grad, ProjectedGradient)
        if only_fills and not fills:
            continue
        weight = one.weight
        of_image = torch.promote_types(weight.dtype, dtype or weight.dtype)
        size = 1 if fills else of_image.itemsize * (weight.numel() if one.needs_renewal else one.coordinate_count)
        is_alike = kind == (fills, of_image, weight.device)
        if not is_alike or size > room:
            kind, room = (fills, of_image, weight.device), most_fills if fills else most_bytes
            buckets.append(Bucket([], fills, of_image))
        buckets[-1].trained.append(one)
        buckets[-1].waits_for.add(id(weight))
        room -= size
    return buckets


def drop_empty(trained: Sequence[TrainedWeight], group: dist.ProcessGroup) -> None:
    """Lets go of projected gradients that are zeros in all processes and could not take up what is to come.

    Args:
        trained: all weights.
        group: the processes.
    """
    kept = []
    for one in trained:
        grad = one.weight.grad
        if isinstance(grad, ProjectedGradient) and (one.needs_renewal or not grad.is_in(one.basis)):
            kept.append((one, grad))
    if not kept:
        return
    device = kept[0][0].weight.device
    stored = [grad.projected for _, grad in kept]
    parts = [each.to_local() if isinstance(each, DTensor) else each for each in stored]
    some = torch.stack([part.any().to(device) for part in parts]).to(torch.int32)
    dist.all_reduce(some, op=dist.ReduceOp.MAX, group=group)
    for (one, _), is_some in zip(kept, some.tolist(), strict=True):
        if not is_some:
            one.weight.grad = None
