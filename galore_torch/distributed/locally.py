"""Averaging every few steps: for slow links, each process moves projected weights by its own gradients in between.

Within a window all processes have the same basis P of a weight, and their weights differ in its span alone. So the
average of all is W + P (mean(P^T W) - P^T W): r x n numbers are sent, and nothing is kept for it. The optimizer's
moments are averaged with them; 8-bit ones stay each process' own. A weight that renews is averaged before, in its old
basis, and its gradient in full; then all take the first one's numbers, so that rounding does not add up. Local steps
with averaged moments are Local Adam's (arXiv 2409.13155); in the subspace an average costs r/m of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from galore_torch.distributed.owners import Replicas
from galore_torch.optim.state_keys import INNER, RENEWALS, STEP
from galore_torch.optim.trained_weight import TrainedWeight


class LocalReplicas(Replicas):
    """Processes whose weights differ between two averages.

    Args:
        group: the processes.
        every: steps between two averages.
    """

    def __init__(self, group: dist.ProcessGroup, every: int) -> None:
        super().__init__(group)
        self._every = every

    def agree(self, found: Tensor) -> Tensor:
        """The largest value that a process has found: all skip the same steps, or their turns would part."""
        largest = found.to(torch.int32) if found.dtype is torch.bool else found
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        return largest.to(found.dtype)

    def level(self, trained: Sequence[TrainedWeight]) -> None:
        """Gives all processes the same weights before their bases change."""
        self._average([one for one in trained if one.state[RENEWALS]])
        for one in trained:
            dist.broadcast(one.weight.data, group_src=0, group=self._group)

    def close(self, trained: Sequence[TrainedWeight]) -> None:
        """The end of a step: averages what has made as many steps as there are between two averages.

        Args:
            trained: all weights whose gradients stay in their processes.
        """
        self._average([one for one in trained if one.state[RENEWALS] and one.state[STEP] % self._every == 0])

    @torch.no_grad()
    def _average(self, trained: Sequence[TrainedWeight]) -> None:
        for one in trained:
            coordinates = one.projection.project(one.weight, one.basis)
            shape = tuple(coordinates.shape)
            moments = [value for value in one.state.get(INNER, {}).values() if _is_moment(value, shape)]
            flat = torch.cat([part.reshape(-1).to(coordinates.dtype) for part in (coordinates, *moments)])
            dist.all_reduce(flat.div_(dist.get_world_size(self._group)), group=self._group)
            mean, *means = torch.split(flat, [part.numel() for part in (coordinates, *moments)])
            one.projection.fold(one.weight, mean.view_as(coordinates) - coordinates, one.basis, alpha=1.0, beta=1.0)
            for moment, its_mean in zip(moments, means, strict=True):
                moment.copy_(its_mean.view_as(moment))


def _is_moment(value: object, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and tuple(value.shape) == shape
