"""Modules that play the same part in every layer, and the figures of their weights together.

``model.layers.3.self_attn.q_proj.weight`` is one of ``q_proj``: what counts layers and experts is left out, and as much
of the name is kept as tells parts apart, such as BERT's three ``dense``. Two shapes of one name are two groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

import torch
from torch import Tensor

from galore_torch.projection.spectra import rank_that_holds
from galore_torch.training.inspection.history import SHARES, GradientHistory


def module_names(weights: Iterable[str]) -> dict[str, str]:
    """The part that each weight plays, by its name.

    >>> weights = ["h.0.output.dense.weight", "h.1.attention.query.weight", "h.0.attention.output.dense.weight"]
    >>> list(module_names(weights).values())
    ['output.dense', 'query', 'attention.output.dense']
    """
    paths = {weight: _path(weight) for weight in weights}
    different = set(paths.values())
    return {weight: ".".join(_shortest(path, different)) for weight, path in paths.items()}


def _path(weight: str) -> tuple[str, ...]:
    """The parts of a name behind the layer's number, without further numbers and without ``weight``."""
    parts = weight.removesuffix(".weight").split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    inside = [part for part in parts[numbers[0] if numbers else 0 :] if not part.isdecimal()]
    return tuple(inside or parts)


def _shortest(path: tuple[str, ...], others: set[tuple[str, ...]]) -> tuple[str, ...]:
    for length in range(1, len(path)):
        end = path[-length:]
        if sum(other[-length:] == end for other in others) == 1:
            return end
    return path


def group_by_module(histories: Sequence[GradientHistory]) -> dict[str, list[GradientHistory]]:
    """The weights of each group, by its name, in the order of the model."""
    names = module_names(one.name for one in histories)
    groups: dict[tuple[str, tuple[int, ...]], list[GradientHistory]] = {}
    for one in histories:
        groups.setdefault((names[one.name], one.shape), []).append(one)
    shapes = Counter(name for name, _ in groups)
    return {
        name if shapes[name] == 1 else f"{name} {'x'.join(map(str, shape))}": own
        for (name, shape), own in groups.items()
    }


class ModuleGroup:
    """The weights of one group and the means of their figures; those at a rank are at `rank`.

    Args:
        histories: of the weights, which have one shape; at least one has a snapshot.
        every: steps between two snapshots.

    Attributes:
        weights: how many of them had a gradient; ``shape``: of each.
        rank: asked for, or the length of the shorter side where that is less.
        stable_rank: over all snapshots.
        held: share of a gradient's energy in its own strongest 1 to k directions, (k,).
        ranks: that hold each of `SHARES` of it.
        captured: by the age of a basis in steps, the share of a later gradient's energy in its first 1 to k, (k,).
        kept: by the age of a basis in steps, what it captures as a share of what one of the least age captures of the
            same gradients, (k,).
        overlap: by the age of a basis in steps, its overlap with the later gradient's own.
        pairs: by the age of a basis in steps, how many gradients each weight's were judged by, at least.
    """

    def __init__(self, histories: Sequence[GradientHistory], every: int) -> None:
        self.histories = histories
        seen = [one for one in histories if one.snapshots]
        self.weights, self.shape, self.rank = len(seen), seen[0].shape, seen[0].rank
        self.stable_rank = fmean(snapshot.stable_rank for one in seen for snapshot in one.snapshots)
        self.held = torch.stack([one.held / len(one.snapshots) for one in seen]).mean(0)
        self.ranks = tuple(rank_that_holds(self.held, share) for share in SHARES)
        self.captured: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor] = {}
        self.overlap: dict[int, float] = {}
        self.pairs: dict[int, int] = {}
        for place in range(seen[0].ages):
            aged = [one for one in seen if one.pairs[place]]
            if aged:
                age = (place + 1) * every
                self.captured[age] = torch.stack([one.captured[place] / one.pairs[place] for one in aged]).mean(0)
                young = torch.stack([one.by_youngest[place] / one.pairs[place] for one in aged]).mean(0)
                self.kept[age] = self.captured[age] / young
                self.overlap[age] = fmean(float(one.overlap[place] / one.pairs[place]) for one in aged)
                self.pairs[age] = min(int(one.pairs[place]) for one in aged)
