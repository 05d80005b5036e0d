"""Which gradients are not finite: found on the device, without waiting for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.trained_weight import TrainedWeight
from galore_torch.projection import Projection, devices

FEW = 2**12
"""Numbers of a tensor on a CPU that are looked at together with those of others: a view takes as long, and torch's norm
twice as long."""


def count_nonfinite(
    trained: Sequence[TrainedWeight],
    projected_grads: Sequence[Tensor],
    agree: Callable[[Tensor], Tensor],
    *,
    everywhere: bool = False,
) -> Tensor:
    """Finds the projected gradients that are not finite, and counts them in the state of the projected weights.

    A number that is not finite in a full gradient spoils a whole slice of the projected one across its projected axes,
    so on a CPU the first entries along these are looked at. A gradient that came projected may have overflowed anywhere
    since, and is looked at as a whole; so are small ones, and all on a GPU, where a view takes longer than what it
    leaves out. Nothing is read back from the device.

    Args:
        trained: the weights, at least one.
        projected_grads: of each weight, or its gradient where it is not projected.
        agree: the largest value of all processes.
        everywhere: whether all projected gradients are looked at as a whole: projecting itself may overflow.

    Returns:
        One boolean for each, on the first one's device.
    """
    seen = projected_grads
    if not (everywhere or devices.runs_ahead(projected_grads[0])):
        seen = [
            projected
            if projected.numel() <= FEW or isinstance(one.grad, ProjectedGradient)
            else _across(projected, one.projection)
            for one, projected in zip(trained, projected_grads, strict=True)
        ]
    bad = agree(peaks(seen).lt(float("inf")).logical_not_())  # a NaN is not less either
    for start, stop in _runs(trained):
        first = trained[start]
        assert first.counters is not None
        first.counters[first.slot : first.slot + stop - start].add_(bad[start:stop])
    return bad


def _runs(trained: Sequence[TrainedWeight]) -> Iterator[tuple[int, int]]:
    """Where weights follow each other as their counters do: one run in an ordinary step."""
    first = trained[0]
    if [one.slot for one in trained] == list(range(first.slot, first.slot + len(trained))) and all(
        one.counters is first.counters for one in trained
    ):
        if first.counters is not None:
            yield 0, len(trained)
        return
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
    gathers = not devices.runs_ahead(tensors[0])
    kinds: dict[Any, list[int]] = {}
    for index, one in enumerate(tensors):
        kind = (one.shape, one.dtype, one.device) if gathers and one.numel() <= FEW else None
        kinds.setdefault(kind, []).append(index)
    found = [_peaks([tensors[index] for index in indices], kind) for kind, indices in kinds.items()]
    if len(found) == 1:
        return found[0]
    found = [peak.to(tensors[0].device) for peak in found]
    order = torch.tensor([index for indices in kinds.values() for index in indices]).argsort()
    return torch.cat(found)[order]


def _peaks(tensors: list[Tensor], kind: Any) -> Tensor:
    """The same of tensors of one shape, which are put together to be looked at; or one by one where `kind` is None."""
    if kind is not None and tensors[0].numel():
        return torch.stack(tensors).view(len(tensors), -1).abs_().amax(1)
    device = tensors[0].device
    # A process' part of a weight may be empty.
    filled = [one if one.numel() else one.new_zeros(1) for one in tensors]
    largest = [peak.to(device) for peak in torch._foreach_norm(filled, float("inf"))]
    dtype = functools.reduce(torch.promote_types, {peak.dtype for peak in largest})
    return torch.stack([peak.to(dtype) for peak in largest])


def _across(projected: Tensor, projection: Projection) -> Tensor:
    for mode in projection.modes:
        projected = projected.narrow(mode.axis, 0, 1)
    return projected
