"""`Outcomes`: what a device finds out about renewals, told to the host one step later.

Whether a gradient is finite and not zero, and whether it tells a whole basis, is decided on the device, which keeps the
old basis where it is not. The host goes on as if it were, and asks when the weight's next step begins: what has not
been renewed then stays due. By that time the device has answered, and has work left to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_torch.optim.state_keys import LACKING, RENEWALS

if TYPE_CHECKING:
    from galore_torch.optim.trained_weight import TrainedWeight


class Reading:
    """Numbers on their way from a device to the host, which does not wait for them.

    Args:
        numbers: on any device.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._arrival = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[float]:
        """The numbers, once they have arrived."""
        if self._arrival is not None:
            self._arrival.synchronize()
        read: list[float] = self._numbers.tolist()
        return read


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a device has found out about a basis: each of no dimensions, on the device.

    Attributes:
        usable: whether the gradient is finite and not zero.
        renewed: whether the basis is a new one.
        partly: whether the gradient has told some of its directions and not all.
    """

    usable: Tensor
    renewed: Tensor
    partly: Tensor


@dataclass(frozen=True, kw_only=True)
class _Awaited:
    """What has been noted of a renewal that may not have been one.

    Attributes:
        trained: the weight.
        before: the numbers in its state before.
        reading: whether the gradient was usable, whether the basis is new, whether the gradient told it in part, its
            columns that are zeros, whether some matrix has none but such, and the mean overlap.
    """

    trained: TrainedWeight
    before: Mapping[str, Any]
    reading: Reading


@dataclass(slots=True)
class Outcomes:
    """Of the renewals of one optimizer.

    Attributes:
        seconds: on the host, that they have taken since the optimizer was made.
        awaited: those that a device has not told yet, by the identity of the weight's state.
    """

    seconds: float = 0.0
    awaited: dict[int, _Awaited] = field(default_factory=dict)

    def expect(self, trained: TrainedWeight, before: Mapping[str, Any], numbers: Tensor) -> None:
        """Waits for what a device tells of a renewal.

        Args:
            trained: the weight, its state as if the basis had been renewed.
            before: the numbers of its state before.
            numbers: as in `_Awaited`.
        """
        self.awaited[id(trained.state)] = _Awaited(trained=trained, before=before, reading=Reading(numbers))

    def settle(self, state: Mapping[str, Any]) -> None:
        """Puts into a weight's state what has become of its last renewal.

        Args:
            state: of the weight.
        """
        one = self.awaited.pop(id(state), None)
        if one is None:
            return
        trained, held, before = one.trained, one.trained.state, one.before
        usable, renewed, partly, missing, some_lack_all, overlap = one.reading.read()
        if not renewed:
            held.update(before)
            if usable and partly and not before[LACKING]:
                held[LACKING] = -1  # the next gradient's directions are to be completed
            elif usable:
                trained.warn_of_failure("it is not finite")
            return
        if not before[RENEWALS] or before[LACKING]:
            most = abs(before[LACKING]) if before[RENEWALS] else trained.projection.basis_columns
            held[LACKING] = int(missing if missing < most or some_lack_all else -missing) or -int(partly)
        if before[RENEWALS] and trained.is_lazy:
            trained.adapt_gap(overlap, before[RENEWALS])

    def settle_all(self) -> None:
        """The same for all weights."""
        for one in list(self.awaited.values()):
            self.settle(one.trained.state)
