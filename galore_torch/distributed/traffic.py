"""Gradients of projected weights are averaged in low rank, in the backward: what DDP and FSDP2 have in common.

What is complete is sent; what has been sent is taken, and becomes the weight's gradient, before `backward()` returns.
Hooks hold the model and the optimizer weakly: see `gradients/hooks.py`.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from galore_torch.gradients import data_parallel
from galore_torch.gradients.data_parallel import Hook
from galore_torch.gradients.known_weights import current_backward
from galore_torch.optim.galore import GaLore
from galore_torch.optim.processes import local_part
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.trained_weight import TrainedWeight

Kind = Literal["gradient", "full", "sketch"]

IN_FLIGHT = 8
"""How many collectives may be on their way."""


class Traffic(data_parallel.Traffic):
    """What one attached model sends and receives. See `gradients/data_parallel.py` for the hooks that it makes.

    Args:
        optimizer: holds the weights.
        weights: whose gradients are averaged here.
        applies: whether gradients are applied in the backward.
    """

    def __init__(self, optimizer: GaLore, weights: Iterable[Tensor], applies: bool) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._weights = [weakref.ref(weight) for weight in weights]
        self._applies = applies
        self._together: Any = None  # the processes, where they are not the optimizer's all the time
        self._synchronizes = True
        self._backward: int | None = None
        self._on_their_way: deque[Any] = deque()
        self._handles: list[Any] = []
        self._form: Hook = lambda _: None
        self._keep: Hook = self._form

    def remove(self) -> None:
        """Ends it."""
        while self._handles:
            self._handles.pop().remove()

    def weights(self) -> list[Tensor]:
        """The weights whose gradients are averaged here."""
        return [weight for weight in (one() for one in self._weights) if weight is not None]

    def takes(self, weight: Tensor) -> bool:
        """See `data_parallel.Traffic`."""
        return any(weight is one for one in self.weights())

    @torch.no_grad()
    def begin(self, *, anew: bool = False) -> None:
        """The first gradient of a backward pass comes.

        Args:
            anew: whether it is the model's output's, of which nothing can have come before.
        """
        backward, optimizer = current_backward(), self._optimizer()
        if optimizer is None or not self._weights or self._backward == backward:
            return
        if self._backward is not None and not anew:
            return  # a re-entrant checkpoint has a pass of its own inside: it belongs to the one around it
        if self._applies and not self._synchronizes:
            raise ValueError(
                "no_sync(), and FSDP2's set_requires_gradient_sync(False), accumulate gradients, and update='backward' "
                "applies each; use update='step'"
            )
        self._backward = backward
        self._on_their_way.clear()
        together: Any = self._together or optimizer._processes
        together.require(optimizer._settings["seed"])
        trained = [optimizer._trained_weight(weight) for weight in self.weights() if weight.requires_grad]
        _drop_empty(trained, together.group)
        self._plan(trained)
        torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _plan(self, trained: list[TrainedWeight]) -> None:
        """What is to be sent in this pass."""

    def _send(self, sent: Any) -> None:
        """Notes what is on its way, and takes what has had time to arrive."""
        self._on_their_way.append(sent)
        while len(self._on_their_way) > (1 if self._applies else IN_FLIGHT):
            self._take(self._on_their_way.popleft())

    def _take(self, sent: Any) -> None:
        """Makes what has arrived the gradients of its weights."""
        raise NotImplementedError

    @torch.no_grad()
    def _finish(self) -> None:
        """The end of the backward pass."""
        while self._on_their_way:
            self._take(self._on_their_way.popleft())
        self._backward = None


def _drop_empty(trained: Sequence[TrainedWeight], group: dist.ProcessGroup) -> None:
    """Lets go of projected gradients that are zeros in all processes and could not take up what is to come."""
    kept = []
    for one in trained:
        grad = one.weight.grad
        if isinstance(grad, ProjectedGradient) and (one.needs_renewal or not grad.is_in(one.basis)):
            kept.append((one.weight, local_part(grad.projected)))
    if not kept:
        return
    some = torch.stack([part.any().to(kept[0][0].device) for _, part in kept]).to(torch.int32)
    dist.all_reduce(some, op=dist.ReduceOp.MAX, group=group)
    for (weight, _), is_some in zip(kept, some.tolist(), strict=True):
        if not is_some:
            weight.grad = None


def grad_or_zeros(one: TrainedWeight, *, full: bool = True) -> Tensor:
    """A weight's gradient in this process.

    Args:
        one: the weight.
        full: whether zeros, where it has none, are of the weight's shape, and not of its projected gradient's.
    """
    weight, grad = one.weight, one.weight.grad
    shape = weight.shape if full else one.projection.projected_shape
    return torch.zeros(shape, dtype=weight.dtype, device=weight.device) if grad is None else grad


@dataclass(eq=False)
class Bucket:
    """Weights whose gradients are averaged in one collective.

    Attributes:
        kind: what is averaged: the gradients, as they are; or what bases are found from, full ones or their sketches.
        dtype: in which they are averaged.
        trained: the weights, of one dtype and device, in the order that all processes know.
        waits_for: the identities of the weights whose gradients are not complete.
        flat: what is reduced: the gradients, and for each whether a process has it.
        shapes: of the gradients.
        handle: of the collective; None before it has begun.
    """

    kind: Kind
    dtype: torch.dtype
    trained: list[TrainedWeight] = field(default_factory=list)
    waits_for: set[int] = field(default_factory=set)
    flat: Tensor = field(init=False)
    shapes: list[torch.Size] = field(init=False)
    handle: Any = None

    def add(self, one: TrainedWeight) -> None:
        """Takes one weight more."""
        self.trained.append(one)
        self.waits_for.add(id(one.weight))

    def reduce(self, group: dist.ProcessGroup) -> None:
        """Begins to average the gradients there are; one that is missing counts as zeros.

        Args:
            group: the processes.
        """
        parts = [self._part(one) for one in self.trained]
        has = torch.tensor([one.weight.grad is not None for one in self.trained], dtype=self.dtype)
        has = has.to(parts[0].device, non_blocking=True)
        self.shapes = [part.shape for part in parts]
        self.flat = torch.cat([*(part.reshape(-1) for part in parts), has]).div_(dist.get_world_size(group))
        self.handle = dist.all_reduce(self.flat, group=group, async_op=True)

    def _part(self, one: TrainedWeight) -> Tensor:
        grad = grad_or_zeros(one, full=self.kind != "gradient" or one.needs_renewal)
        if self.kind == "sketch":
            grad = one.sketch(grad)
        return (grad.projected if isinstance(grad, ProjectedGradient) else grad).to(self.dtype)

    def averages(self) -> Iterator[tuple[TrainedWeight, Tensor]]:
        """Waits for the collective.

        Yields:
            Each weight that a process has a gradient of, and the average: of its projected gradient's shape, or of its
            own.
        """
        self.handle.wait()
        *parts, has = torch.split(self.flat, [*(shape.numel() for shape in self.shapes), len(self.trained)])
        del self.flat
        # What this process has, another cannot lack: only a weight that it has not used is asked about.
        for one, part, shape, share in zip(self.trained, parts, self.shapes, has, strict=True):
            if one.weight.grad is not None or share.item():
                yield one, part.view(shape)
