"""What has become of each weight's subspace: how often it was renewed, how often it will be, and how far it moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from galore_torch.optim.state_keys import CAPTURED, OVERLAPS, RENEWALS
from galore_torch.optim.trained_weight import TrainedWeight


@dataclass(frozen=True, kw_only=True)
class Subspace:
    """The subspace of one projected weight.

    Attributes:
        renewals: how many bases it has had.
        gap: steps between two renewals, as things stand: the weight's own if it renews lazily.
        overlap: how much of the last basis but one is left in the last, from 0 (as of random ones) to 1 (the same);
            not a number before there are two.
        captured: share of the energy ||G||_F^2 of the gradient at the last renewal that the basis before it still
            held, from 0 to 1; not a number before there are two.
    """

    renewals: int
    gap: int
    overlap: float
    captured: float


def subspaces_of(trained: Sequence[TrainedWeight]) -> dict[str, Subspace]:
    """The subspaces of projected weights, read back from the device at once.

    Args:
        trained: the weights, with their state prepared.

    Returns:
        By the weight's name; where several have the same, with its place among the projected ones.
    """
    if not trained:
        return {}
    last = [torch.stack((one.state[OVERLAPS][-1], one.state[CAPTURED])) for one in trained]
    figures = torch.stack([one.to(last[0].device) for one in last]).tolist()
    count = Counter(one.name for one in trained)
    return {
        one.name if count[one.name] == 1 else f"{one.name} (projected weight {one.index})": Subspace(
            renewals=one.state[RENEWALS],
            gap=one.gap,
            overlap=overlap if one.state[RENEWALS] > 1 else float("nan"),
            captured=captured if one.state[RENEWALS] > 1 else float("nan"),
        )
        for one, (overlap, captured) in zip(trained, figures, strict=True)
    }
