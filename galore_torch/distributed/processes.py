"""What the processes of a job do together: agree on what they were given, and divide renewals among themselves.

A layer's basis is found by its owner, from the whole gradient, and the others get it. All hold the same list of layers
and the same state: what they decide from these they decide alike; what they compute, one of them computes.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.model_averaging.utils import average_parameters

import galore_torch
from galore_torch.lowbit import QuantizedWeight
from galore_torch.optim.galore import GaLore
from galore_torch.optim.groups import parameter_name
from galore_torch.optim.nonfinite import tell_bases
from galore_torch.optim.processes import Alone, is_sharded, whole
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.state_keys import BASIS, INNER, RENEWALS, STEP
from galore_torch.optim.trained_weight import TrainedWeight
from galore_torch.projection import Basis

_ASKED = ("optimizer_class", "fallback_class", "state_dtype", "rounding", "skip_nonfinite", "shard_bases")
"""Settings of an optimizer that its groups do not say."""

_PLAIN = (int, float, str, tuple, type(None))
"""Types of the values in groups that read the same in all processes."""


class Together(Alone):
    """The processes of a job, whose gradients may differ: under FSDP2 each has its part of one.

    Args:
        optimizer: of this process.
        group: the processes.
        **choices: of `attach`, by name.
    """

    def __init__(self, optimizer: GaLore, group: dist.ProcessGroup, **choices: Any) -> None:
        super().__init__()
        self.group = group
        self._optimizer = weakref.proxy(optimizer)
        self._choices = choices
        self._agreed = False

    def require(self, seed: int) -> None:
        """Checks, once, that all processes say the same of weights, groups, settings and versions.

        Args:
            seed: of this process' optimizer.

        Raises:
            ValueError: they do not; every process is told the first thing that differs, and what each one says.
        """
        if self._agreed:
            return
        said: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(said, self._said(seed), group=self.group)
        for name in {name: None for one in said for name in one}:
            values = [one.get(name, "nothing") for one in said]
            if len(set(values)) > 1:
                told = "; ".join(f"rank {rank}: {name} {value}" for rank, value in enumerate(values))
                raise ValueError(
                    f"the processes of this job were given different optimizers ({told}): their bases and weights would"
                    " drift apart. Build model and optimizer alike in all of them, from the same settings and not their"
                    " rank"
                )
        self._agreed = True

    def ask_again(self) -> None:
        """Has the next step compare once more what the processes say."""
        self._agreed = False

    def _said(self, seed: int) -> dict[str, str]:
        said = {"torch": torch.__version__, "galore_torch": galore_torch.__version__, "seed": seed, **self._choices}
        said |= {name: self._optimizer._settings.get(name, False) for name in _ASKED}
        for number, group in enumerate(self._optimizer.param_groups):
            plain = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in group.items()}
            said |= {f"{key} of group {number}": value for key, value in plain.items() if isinstance(value, _PLAIN)}
            for index, weight in enumerate(group["params"]):
                named = f"weight {index} of group {number}"
                said[named] = f"{parameter_name(group, index)} {tuple(weight.shape)} {weight.dtype}"
        return {name: str(value) for name, value in said.items()}

    def agree(self, found: Tensor) -> Tensor:
        """The largest value that a process has found: all skip the same steps, or their turns would part."""
        largest = found.to(torch.int32) if found.dtype is torch.bool else found
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return largest.to(found.dtype)

    def renew(self, trained: Sequence[TrainedWeight]) -> None:
        """Renews bases, each found by one process.

        Raises:
            RuntimeError: the processes hold different weights or bases, in all of them.
        """
        told = [one for one in trained if not isinstance(one.weight.grad, ProjectedGradient)]
        for one in trained:
            if isinstance(one.weight.grad, ProjectedGradient):  # it brings the basis that was found in the backward
                one.renew()
        for one, basis in zip(told, self.bases(told), strict=True):
            if basis is not None:
                one.take(basis)

    def bases(self, trained: Sequence[TrainedWeight], given: Sequence[Tensor] | None = None) -> list[Basis | None]:
        """The bases that full gradients tell.

        Args:
            trained: the weights, the same ones in all processes.
            given: what to find them from in the place of the weights' gradients, which tell bases: averages that all
                have, of gradients or of sketches of these. Only its owner looks whether one tells a basis.

        Returns:
            One for each; None where the decomposition failed or nothing tells a basis, in every process alike.

        Raises:
            RuntimeError: the processes hold different weights or bases, in all of them.
        """
        if not trained:
            return []
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        owners = [(place + one.state[STEP]) % size for place, one in enumerate(trained)]
        owned: list[tuple[Tensor, Basis] | None] = [None] * len(trained)
        for place, owner in enumerate(owners):  # all, before one is decomposed: the others would wait for that
            # gathered by every process, as FSDP2 gathers a weight
            full = whole(trained[place].weight.grad) if given is None else given[place]
            old = dict(trained[place].basis)
            if owner == rank:
                owned[place] = full, old
        del full, old
        tells = repeat(True) if given is None else iter(tell_bases([own[0] for own in owned if own is not None]))
        found = [
            None if own is None or not next(tells) else one.decompose(*own)
            for one, own in zip(trained, owned, strict=True)
        ]
        del owned
        are_found = self._compare(trained, [basis is not None for basis in found])
        return [
            self._share(one, basis, owner) if is_found else None
            for one, basis, owner, is_found in zip(trained, found, owners, are_found, strict=True)
        ]

    def _compare(self, trained: Sequence[TrainedWeight], found: Sequence[bool]) -> list[bool]:
        """Tells all processes what was found, and checks on the way that they hold the same weights and bases."""
        device = trained[0].weight.device
        sums = torch.stack([_checksum(one).to(device) for one in trained])
        most = torch.cat((torch.tensor(found, dtype=torch.int64, device=device), sums, -sums))
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        are_found, largest, smallest = most.view(3, -1).tolist()
        for one, high, low in zip(trained, largest, smallest, strict=True):
            if high != -low:
                raise RuntimeError(
                    f"the processes hold different values of {one.name} or of its basis: they have drifted apart since "
                    f"its last renewal, before step {one.state[STEP] + 1}. Load a checkpoint, and let nothing change "
                    "weights or gradients in one process alone"
                )
        return [bool(flag) for flag in are_found]

    def _share(self, one: TrainedWeight, found: Basis | None, owner: int) -> Basis:
        factors = {}
        for name, shape in one.projection.factor_shapes.items():
            factors[name] = torch.empty(shape, dtype=one.weight.dtype, device=one.weight.device)
            if found is not None:
                factors[name].copy_(found[name])
            dist.broadcast(factors[name], group_src=owner, group=self.group)
        return one.as_stored(factors)


class Replicas(Together):
    """Processes that hold the same weights and gradients."""

    def agree(self, found: Tensor) -> Tensor:
        """What this process has found: the others have found the same."""
        return found


class LocalReplicas(Together):
    """Processes that move projected weights by their own gradients, and average them every few steps: for slow links.

    Within a window all have the same basis P of a weight, and their weights differ in its span alone. So the average is
    W + P (mean(P^T W) - P^T W): r x n numbers are sent, and nothing is kept for it. The optimizer's moments are
    averaged with them; 8-bit ones stay each process' own. A weight that renews is averaged before, in its old basis;
    then all take the first one's numbers, so that rounding does not add up. Local steps with averaged moments are Local
    Adam's (arXiv 2409.13155); in the subspace an average costs r/m of theirs.
    """

    def bases(self, trained: Sequence[TrainedWeight], given: Sequence[Tensor] | None = None) -> list[Basis | None]:
        """The bases that full gradients tell. All processes have the same weights before these change."""
        self.average([one for one in trained if one.state[RENEWALS]])
        for one in trained:
            dist.broadcast(one.weight.data, group_src=0, group=self.group)
        return super().bases(trained, given)

    @torch.no_grad()
    def average(self, trained: Sequence[TrainedWeight]) -> None:
        """Averages weights and their moments.

        Args:
            trained: the weights, which have bases.
        """
        for one in trained:
            mine = one.projection.project(one.weight, one.basis)
            mean, held = mine.clone(), filter(torch.is_tensor, one.state.get(INNER, {}).values())
            moments = [value for value in held if value.is_floating_point() and value.shape == mine.shape]
            average_parameters(iter([mean, *moments]), self.group)  # type: ignore[list-item]
            one.projection.fold(one.weight, mean - mine, one.basis, alpha=1.0, beta=1.0)


def _checksum(one: TrainedWeight) -> Tensor:
    """Of a basis and of a weight that all hold whole: a sum of their bits, exact in any order and on any device."""
    weight = one.weight.codes if isinstance(one.weight, QuantizedWeight) else one.weight
    basis = one.state[BASIS].values() if one.storage.bits == 16 else one.basis.values()
    parts = [part for part in (weight, *(basis if one.state[RENEWALS] else ())) if not is_sharded(part)]
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = [one.contiguous().view(integers[one.itemsize]) if one.is_floating_point() else one for one in parts]
    sums = [one.detach().sum(dtype=torch.int64) for one in bits]
    return torch.stack(sums).sum() % 2**61 if sums else torch.zeros((), dtype=torch.int64)
