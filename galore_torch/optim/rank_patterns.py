"""Ranks by the names of weights: `{"q_proj": 32, "mlp.down_proj": 64}`, as PEFT has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from galore_torch.group_keys import checked_key
from galore_torch.messages import list_names
from galore_torch.optim.checkpoint import WRAPPERS
from galore_torch.optim.groups import is_projected


def ranks_of(groups: Sequence[dict[str, Any]], pattern: Mapping[str, int]) -> dict[str, int]:
    """The rank that each projected weight is given.

    Args:
        groups: parameter groups, with names.
        pattern: ranks by names: of weights, or ends of them by whole parts, without the numbers of layers and experts
            (or with * in their place), with or without `weight`. The longest that fits counts.

    Returns:
        Ranks by weights' names; what no name fits is not among them.

    Raises:
        ValueError: a rank out of range, a name that is no string or given twice, or one that fits no projected weight.
    """
    if not isinstance(pattern, Mapping):
        raise ValueError(f'rank_pattern = {pattern!r} is no mapping; give ranks by names, such as {{"q_proj": 32}}')
    ranks = {_end(key, pattern): checked_key("rank", rank) for key, rank in pattern.items()}
    if len(ranks) < len(pattern):
        raise ValueError(f"rank_pattern = {pattern!r} names the same weights twice; give one rank for each name")
    names = [name for group in groups if is_projected(group) for name in group["param_names"]]
    fits = {name: [end for end in ranks if _is_end(end, name)] for name in names}
    _require_use(ranks, fits)
    return {name: ranks[max(ends, key=len)] for name, ends in fits.items() if ends}


def _end(key: Any, pattern: Mapping[str, int]) -> str:
    """A name of the pattern as a model has it that nobody has wrapped, without what all weights have in common."""
    if not isinstance(key, str):
        raise ValueError(f'rank_pattern = {pattern!r} has {key!r} for a name; give strings, such as "q_proj"')
    return WRAPPERS.sub("", key).removesuffix(".weight").replace("*.", "")


def _require_use(pattern: Mapping[str, int], fits: Mapping[str, Iterable[str]]) -> None:
    unused = pattern.keys() - {end for ends in fits.values() for end in ends}
    if unused:
        raise ValueError(
            f"rank_pattern = {pattern!r}: no projected weight's name ends by {min(unused)}; they are "
            f"{list_names(list(fits), 20)}"
        )


def _is_end(end: str, name: str) -> bool:
    whole = WRAPPERS.sub("", name).removesuffix(".weight")
    parts = [part for part in whole.split(".") if not part.isdecimal()]
    return end == whole or parts[-len(end.split(".")) :] == end.split(".")


def split_by_rank(groups: Sequence[dict[str, Any]], pattern: Mapping[str, int]) -> list[dict[str, Any]]:
    """Gives each rank of projected weights a group of its own.

    Args:
        groups: parameter groups, with names.
        pattern: ranks by names, as for `ranks_of`.

    Returns:
        The groups. A weight that no name fits keeps its group's rank.

    Raises:
        ValueError: as `ranks_of`.
    """
    ranks = ranks_of(groups, pattern)
    made: list[dict[str, Any]] = []
    for group in groups:
        parts: dict[int | None, dict[str, Any]] = {}
        for name, weight in zip(group["param_names"], group["params"], strict=True):
            rank = ranks.get(name, group.get("rank"))
            ranked = {} if rank is None else {"rank": rank}
            own = parts.setdefault(rank, {**group, **ranked, "params": [], "param_names": []})
            own["params"].append(weight)
            own["param_names"].append(name)
        made += parts.values()
    return made
