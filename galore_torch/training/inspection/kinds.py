"""Weights that play the same part in every layer, and their figures together.

A kind is a weight's name without what counts layers and experts: ``model.layers.3.self_attn.q_proj.weight`` is one of
``q_proj``. Where that would name two parts alike, as BERT's three ``dense``, as much of the name is kept as tells them
apart. Weights of one kind but of two shapes are two kinds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from galore_torch.projection.spectra import rank_that_holds
from galore_torch.training.inspection.watch import SHARES, Watch


def kind_names(weights: Iterable[str]) -> dict[str, str]:
    """The kind of each weight, by its name.

    >>> names = [f"encoder.layer.{i}.{part}.weight" for i in (0, 1) for part in ("output.dense", "attention.query")]
    >>> kind_names([*names, "encoder.layer.0.attention.output.dense.weight"])["encoder.layer.1.attention.query.weight"]
    'query'
    >>> kind_names([*names, "encoder.layer.0.attention.output.dense.weight"])[names[0]]
    'output.dense'
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


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The weights of one kind, and the means of their figures; those at a rank are at `rank`.

    Attributes:
        name: of the kind.
        shape: of each weight.
        weights: how many there are.
        rank: asked for, or the length of the shorter side where that is less.
        stable_rank: over all looks.
        ranks: that hold each of `SHARES` of the mean gradient's energy.
        held: share of a gradient's energy in its own strongest 1 to k directions, (k,).
        captured: by the age of a basis in steps, the share of a later gradient's energy in its first 1 to k, (k,).
        kept: by the age of a basis in steps, what it captures as a share of what one of the least age captures of the
            same gradients, (k,).
        overlap: by the age of a basis in steps, its overlap with the later gradient's own.
        pairs: by the age of a basis in steps, how many gradients each weight's were judged by, at least.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    rank: int
    stable_rank: float
    ranks: tuple[int, ...]
    held: Tensor
    captured: dict[int, Tensor]
    kept: dict[int, Tensor]
    overlap: dict[int, float]
    pairs: dict[int, int]


def gathered(watches: Sequence[Watch]) -> dict[str, list[Watch]]:
    """The watches by kind, in the order of the model.

    Args:
        watches: of all weights.
    """
    names = kind_names(watch.name for watch in watches)
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for watch in watches:
        shapes.setdefault(names[watch.name], set()).add(tuple(watch.shape))
    found: dict[str, list[Watch]] = {}
    for watch in watches:
        name = names[watch.name]
        label = name if len(shapes[name]) == 1 else f"{name} {'x'.join(map(str, watch.shape))}"
        found.setdefault(label, []).append(watch)
    return found


def summarized(name: str, watches: Sequence[Watch], every: int) -> Kind | None:
    """The figures of one kind.

    Args:
        name: its name.
        watches: its weights'.
        every: steps between two looks.

    Returns:
        The means; None when no weight had a gradient that could be looked at.
    """
    seen = [watch for watch in watches if watch.looks]
    if not seen:
        return None
    held = torch.stack([watch.held / len(watch.looks) for watch in seen]).mean(0)
    captured, kept, overlap, pairs = {}, {}, {}, {}
    for place in range(seen[0].ages):
        aged = [watch.by_age[place] for watch in seen if watch.by_age[place].pairs]
        if not aged:
            continue
        age = (place + 1) * every
        captured[age] = torch.stack([one.captured / one.pairs for one in aged]).mean(0)
        kept[age] = captured[age] / torch.stack([one.at_first / one.pairs for one in aged]).mean(0)
        overlap[age] = fmean(one.overlap / one.pairs for one in aged)
        pairs[age] = min(one.pairs for one in aged)
    return Kind(
        name=name,
        shape=tuple(seen[0].shape),
        weights=len(seen),
        rank=seen[0].rank,
        stable_rank=fmean(look.stable_rank for watch in seen for look in watch.looks),
        ranks=tuple(rank_that_holds(held, share) for share in SHARES),
        held=held,
        captured=captured,
        kept=kept,
        overlap=overlap,
        pairs=pairs,
    )
