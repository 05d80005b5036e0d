"""Which gradients are not finite: found on the device, without waiting for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_torch import devices
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.trained_weight import TrainedWeight
from galore_torch.projection import Projection

FEW = 2**12
"""Numbers of a tensor on a CPU that are looked at together with those of others: a view takes as long."""


class NonfiniteCounter:
    """Finds the projected gradients of some weights that are not finite, and counts them in the weights' states.

    A number that is not finite in a full gradient spoils a whole slice of the projected one across its projected axes,
    so on a CPU the first entries along these are looked at. A gradient that came projected may have overflowed anywhere
    since, and is looked at as a whole; so are small ones, and all on a GPU, where a view takes longer than what it
    leaves out. Nothing is read back from the device.

    Args:
        trained: the weights, at least one.
        projected_grads: of each weight, or its gradient where it is not projected: those of any step.
    """

    def __init__(self, trained: Sequence[TrainedWeight], projected_grads: Sequence[Tensor]) -> None:
        self._trained = trained
        self._together = _Together(projected_grads)
        self._large = [] if devices.runs_ahead(projected_grads[0]) else self._together.others
        self._runs = list(_runs(trained))

    def count(
        self, projected_grads: Sequence[Tensor], agree: Callable[[Tensor], Tensor], *, everywhere: bool = False
    ) -> Tensor:
        """Counts those of one step.

        Args:
            projected_grads: of each weight.
            agree: the largest value of all processes.
            everywhere: whether all are looked at as a whole: projecting itself may overflow.

        Returns:
            One boolean for each, on the first one's device.
        """
        seen = list(projected_grads)
        for index in [] if everywhere else self._large:
            one = self._trained[index]
            if not isinstance(one.grad, ProjectedGradient):
                seen[index] = _across(seen[index], one.projection)
        bad = agree(self._together.peaks(seen).lt(float("inf")).logical_not_())  # a NaN is not less either
        for start, stop in self._runs:
            first = self._trained[start]
            assert first.counters is not None
            first.counters[first.slot : first.slot + stop - start].add_(bad[start:stop])
        return bad


def _runs(trained: Sequence[TrainedWeight]) -> Iterator[tuple[int, int]]:
    """Where weights follow each other as their counters do: one run in an ordinary step."""
    start = 0
    for stop in range(1, len(trained) + 1):
        before = trained[stop - 1]
        follows = (
            stop < len(trained) and trained[stop].counters is before.counters and trained[stop].slot == before.slot + 1
        )
        if not follows:
            if trained[start].counters is not None:
                yield start, stop
            start = stop


def tell_bases(gradients: Sequence[Tensor], agree: Callable[[Tensor], Tensor] = lambda found: found) -> list[bool]:
    """Whether a basis can be found from each gradient: those that are finite and not zero. Synchronizes.

    Args:
        gradients: full, projected, or sketches of full ones.
        agree: the largest value of all processes, where they may differ.
    """
    if not gradients:
        return []
    found = agree(peaks(gradients).nan_to_num(nan=float("inf"), posinf=float("inf")))
    return [0 < peak < float("inf") for peak in found.tolist()]


def peaks(tensors: Sequence[Tensor]) -> Tensor:
    """The largest absolute entries of tensors, as one vector on the first one's device.

    Args:
        tensors: at least one, of any floating dtypes.

    Returns:
        (number of tensors,); not finite where an entry is not finite, 0 only where all entries are 0.
    """
    return _Together(tensors).peaks(tensors)


class _Together:
    """Which tensors are looked at together: on a CPU small ones of one shape are put together.

    Attributes:
        others: the indices of those that are looked at one by one.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.others: list[int] = []
        kinds: dict[Any, list[int]] = {}
        gathers = not devices.runs_ahead(tensors[0])
        for index, one in enumerate(tensors):
            is_gathered = gathers and 0 < one.numel() <= FEW
            kind = kinds.setdefault((one.shape, one.dtype, one.device), []) if is_gathered else self.others
            kind.append(index)
        self._gathered = list(kinds.values())
        indices = [index for alike in (*self._gathered, self.others) for index in alike]
        # Numbers of Python's, for nothing is to stay on the device.
        self._order = sorted(range(len(indices)), key=indices.__getitem__) if indices != sorted(indices) else None

    def peaks(self, tensors: Sequence[Tensor]) -> Tensor:
        """As the function of this name.

        Args:
            tensors: as many as there were, of the same shapes.
        """
        device = tensors[0].device
        found = [
            torch.stack([tensors[index] for index in indices]).view(len(indices), -1).abs_().amax(1).to(device)
            for indices in self._gathered
        ]
        if self.others:
            found.append(_norms([tensors[index] for index in self.others], device))
        together = found[0] if len(found) == 1 else torch.cat(found)
        return together if self._order is None else together[self._order]


def _norms(tensors: list[Tensor], device: torch.device) -> Tensor:
    # A process' part of a weight may be empty.
    filled = [one if one.numel() else one.new_zeros(1) for one in tensors]
    in_one_call = devices.runs_ahead(filled[0])
    found = torch._foreach_norm(filled, float("inf")) if in_one_call else map(devices.largest_entry, filled)
    largest = [peak.to(device) for peak in found]
    dtype = functools.reduce(torch.promote_types, {peak.dtype for peak in largest})
    return torch.stack([peak.to(dtype) for peak in largest])


def _across(projected: Tensor, projection: Projection) -> Tensor:
    for mode in projection.modes:
        projected = projected.narrow(mode.axis, 0, 1)
    return projected
