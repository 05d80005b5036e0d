"""Under FSDP2: arithmetic is on this process' part of each weight, and the rule's state is cut as the weight is.

Bases are whole in all processes. An owner finds one from the whole gradient, which is gathered to it alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from galore_torch.distributed.agreement import require_agreement
from galore_torch.distributed.by_element import require_by_element
from galore_torch.distributed.cut import Cut
from galore_torch.distributed.owners import renew_together
from galore_torch.optim.galore import GaLore
from galore_torch.optim.processes import Alone
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.state_keys import INNER
from galore_torch.optim.trained_weight import TrainedWeight
from galore_torch.projection import Basis, Projection


def shard(trained: TrainedWeight, optimizer: GaLore) -> ShardedWork:
    """The work on a DTensor.

    Args:
        trained: on it as if it were whole.
        optimizer: that holds it; it is told of the processes.

    Raises:
        ValueError: a placement, an optimizer inside or a rounding that is not supported.
    """
    assert isinstance(trained.weight, DTensor)
    require_by_element(trained)
    cut = Cut.of(trained.weight, trained.name)
    if not isinstance(optimizer._processes, Shards):
        optimizer._processes = Shards(optimizer, cut.group)
    return ShardedWork.of(trained, cut)


@dataclass(slots=True, kw_only=True)
class ShardedWork(TrainedWeight):
    """One weight of which each process holds a part.

    Attributes:
        cut: which part.
        part_projection: how it is projected.
        is_contracted: whether projected gradients are parts of a sum.
    """

    cut: Cut
    part_projection: Projection
    is_contracted: bool

    @classmethod
    def of(cls, trained: TrainedWeight, cut: Cut) -> ShardedWork:
        """The same work on a part.

        Args:
            trained: on the whole weight.
            cut: which part.
        """
        given = {one.name: getattr(trained, one.name) for one in fields(trained) if one.init}
        projection = cut.projection(trained.projection)
        contracted = cut.is_contracted(trained.projection)
        return cls(**given, cut=cut, part_projection=projection, is_contracted=contracted)

    @property
    def grad(self) -> Tensor:
        """This process' part of the gradient."""
        grad = self.weight.grad
        assert grad is not None
        return grad if isinstance(grad, ProjectedGradient) else _part(grad)

    @property
    def local(self) -> Tensor:
        """This process' part of the weight."""
        part: Tensor = _part(self.weight)
        return part

    @property
    def local_projection(self) -> Projection:
        """How that is projected."""
        return self.part_projection

    @property
    def factors(self) -> Basis:
        """What of the basis this process' part needs."""
        if self._factors is None:
            self._factors = self.cut.factors(self.projection, self.basis)
        return self._factors

    def inner_grad(self) -> Tensor:
        """This process' part of what the rule gets as gradient; all of it where parts are summed."""
        projected = TrainedWeight.inner_grad(self)
        if self.is_contracted:
            dist.all_reduce(projected, group=self.cut.group)
        return projected

    def captured(self, basis: Basis) -> Tensor:
        """The share of the gradient's energy that a basis holds, in all processes together."""
        grad = self.grad
        projected = self.part_projection.project(grad, self.cut.factors(self.projection, basis))
        if self.is_contracted:
            dist.all_reduce(projected, group=self.cut.group)
        energies = torch.stack([one.double().square().sum() for one in (projected, grad)])
        if not self.cut.is_whole:
            dist.all_reduce(energies, group=self.cut.group)
        inside, whole = energies.unbind()
        return inside / whole / (dist.get_world_size(self.cut.group) if self.is_contracted else 1)

    def opened(self, inner: Any) -> Any:
        """The rule's state of this process' part."""
        whole = self._whole_shape
        return {
            key: self.cut.unwrap(value) if isinstance(value, Tensor) and self._is_cut(value, whole) else value
            for key, value in inner.items()
        }

    def closed(self, inner: Any) -> Any:
        """The rule's state, of which each process holds a part."""
        held = self.state.get(INNER, {})
        if held.keys() == inner.keys() and all(_part(held[key]) is value for key, value in inner.items()):
            return held
        whole, part = self._whole_shape, self._part_shape
        return {
            key: self.cut.wrap(value, whole) if isinstance(value, Tensor) and self._is_cut(value, part) else value
            for key, value in inner.items()
        }

    def _is_cut(self, value: Tensor, shape: tuple[int, ...]) -> bool:
        return tuple(value.shape) == shape and bool(shape) and not (self.is_contracted and self.through_coordinates)

    @property
    def _whole_shape(self) -> tuple[int, ...]:
        return self.projection.projected_shape if self.through_coordinates else tuple(self.weight.shape)

    @property
    def _part_shape(self) -> tuple[int, ...]:
        return self.part_projection.projected_shape if self.through_coordinates else tuple(self.local.shape)


def _part(value: Any) -> Any:
    return value._local_tensor if isinstance(value, DTensor) else value


class Shards(Alone):
    """Processes that hold parts of each weight.

    Args:
        optimizer: of this process.
        group: the processes.
    """

    def __init__(self, optimizer: GaLore, group: dist.ProcessGroup) -> None:
        self._optimizer, self._group = weakref.proxy(optimizer), group
        self._agreed = False

    def require(self, seed: int) -> None:
        """Checks, before the first step, that all processes were given the same."""
        del seed  # one thing of many
        if not self._agreed:
            require_agreement(self._optimizer, {}, self._group)
            self._agreed = True

    def agree(self, found: Tensor) -> Tensor:
        """The largest value that a process has found: a gradient that is not finite in one part is so for all."""
        largest = found.to(torch.int32) if found.dtype is torch.bool else found
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        return largest.to(found.dtype)

    def renew(self, trained: Sequence[TrainedWeight]) -> None:
        """Renews bases, each found by one process."""
        renew_together(trained, self._group, _gather)


def _gather(one: TrainedWeight, owner: int) -> Tensor | None:
    return one.cut.gather(one.grad, owner) if isinstance(one, ShardedWork) else one.grad
