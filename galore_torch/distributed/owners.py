"""Renewals are divided among processes: an owner finds a layer's basis, and the others get it.

All processes hold the same gradient then, the same state and the same list of layers. What they decide from these they
decide alike; what they compute, one of them computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from galore_torch.lowbit import QuantizedWeight
from galore_torch.optim.processes import Alone, is_sharded
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.state_keys import RENEWALS, STEP
from galore_torch.optim.trained_weight import TrainedWeight
from galore_torch.projection import Basis


class Replicas(Alone):
    """Processes that hold the same weights and gradients.

    Args:
        group: the processes.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self._group = group

    def require(self, seed: int) -> None:
        """Nothing: they have agreed in the forward pass."""

    def level(self, trained: Sequence[TrainedWeight]) -> None:
        """Gives all processes the same weights before their bases change: they have them."""

    def close(self, trained: Sequence[TrainedWeight]) -> None:
        """The end of a step of these weights."""

    def renew(self, trained: Sequence[TrainedWeight]) -> None:
        """Renews bases, each found by one process."""
        self.level(trained)
        renew_together(trained, self._group, lambda one, _: one.grad)


Gather = Callable[[TrainedWeight, int], Tensor | None]
"""A weight's whole gradient in the process of that number, which is its owner; in the others it need not be."""


def renew_together(trained: Sequence[TrainedWeight], group: dist.ProcessGroup, gather: Gather) -> None:
    """Renews bases, each found by one process.

    Args:
        trained: the weights, the same ones in all processes.
        group: the processes.
        gather: brings a gradient to its owner.

    Raises:
        RuntimeError: the processes hold different weights or bases, in all of them.
    """
    told = [one for one in trained if not isinstance(one.grad, ProjectedGradient)]
    for one in trained:
        if isinstance(one.grad, ProjectedGradient):  # it brings the basis that was found in the backward
            one.renew()
    for one, basis in zip(told, bases_of(told, group, gather), strict=True):
        if basis is not None:
            one.take(basis)


def bases_of(trained: Sequence[TrainedWeight], group: dist.ProcessGroup, gather: Gather) -> list[Basis | None]:
    """The bases that full gradients tell.

    Args:
        trained: the weights, the same ones in all processes.
        group: the processes.
        gather: brings a gradient to its owner.

    Returns:
        One for each; None where the decomposition failed, in every process alike.

    Raises:
        RuntimeError: the processes hold different weights or bases, in all of them.
    """
    if not trained:
        return []
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    owners = [(place + one.state[STEP]) % size for place, one in enumerate(trained)]
    grads = [gather(one, owner) for one, owner in zip(trained, owners, strict=True)]
    found = [
        one.decompose(grad) if owner == rank and grad is not None else None
        for one, owner, grad in zip(trained, owners, grads, strict=True)
    ]
    del grads
    is_found = _agree(trained, [basis is not None for basis in found], group)
    return [
        _share(one, basis, owner, group) if exists else None
        for one, basis, owner, exists in zip(trained, found, owners, is_found, strict=True)
    ]


def _share(one: TrainedWeight, found: dict[str, Tensor] | None, owner: int, group: dist.ProcessGroup) -> Basis:
    weight, factors = one.weight, {}
    for name, shape in one.projection.factor_shapes.items():
        if found is None:
            factor = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        else:
            factor = found[name].contiguous()
        dist.broadcast(factor, group_src=owner, group=group)
        factors[name] = factor
    return one.as_stored(factors)


def _agree(trained: Sequence[TrainedWeight], found: Sequence[bool], group: dist.ProcessGroup) -> list[bool]:
    """Tells all processes what was found, and checks on the way that they hold the same weights and bases."""
    device = trained[0].weight.device
    sums = torch.stack([_checksum(one).to(device) for one in trained])
    most = torch.cat((torch.tensor(found, dtype=torch.int64, device=device), sums, -sums))
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    is_found, largest, smallest = most.view(3, -1).tolist()
    for one, high, low in zip(trained, largest, smallest, strict=True):
        if high != -low:
            raise RuntimeError(
                f"the processes hold different values of {one.name} or of its basis: they have drifted apart since its "
                f"last renewal, before step {one.state['step'] + 1}. Load a checkpoint, and let nothing change weights "
                "or gradients in one process alone"
            )
    return [bool(flag) for flag in is_found]


def _checksum(one: TrainedWeight) -> Tensor:
    """Of a basis and of a weight that all hold whole: a sum of their bits, exact in any order and on any device."""
    weight = one.weight.codes if isinstance(one.weight, QuantizedWeight) else one.weight
    parts = [*(() if is_sharded(weight) else (weight,)), *(one.basis.values() if one.state[RENEWALS] else ())]
    sums = [_bits(part.detach()).sum(dtype=torch.int64) for part in parts]
    return torch.stack(sums).sum() % 2**61 if sums else torch.zeros((), dtype=torch.int64)


def _bits(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
