"""`lower_ranks`: fewer directions from now on, and the memory of the others given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from galore_torch.optim.agreement import is_one_of_several
from galore_torch.optim.galore import GaLore
from galore_torch.optim.groups import is_projected, projection_in
from galore_torch.optim.kinds import require_galore
from galore_torch.optim.moments import moments_of
from galore_torch.optim.projected_gradient import ProjectedGradient
from galore_torch.optim.rank_patterns import ranks_of
from galore_torch.optim.state_keys import BASIS, INNER, LACKING
from galore_torch.optim.trained_weight import TrainedWeight
from galore_torch.projection import Projection, lacking


def lower_ranks(optimizer: GaLore, rank_pattern: Mapping[str, int]) -> None:
    """Lowers ranks between two steps, such as where a later gradient needs fewer directions than the first ones.

    Of each weight's basis the first directions stay, which are the strongest ones as `warm`, `randomized` and `svd`
    order them, and of the moments what belongs to these: the state is that of the lower rank, and what is left over is
    freed at once. As after `load_state_dict`, groups are new dictionaries in `optimizer.param_groups`.

    Args:
        optimizer: with names in its groups, between a `zero_grad()` and the next backward pass.
        rank_pattern: ranks by names, as `param_groups` has them; `choose_ranks` gives one. What none fits stays.

    Raises:
        ValueError: no GaLore optimizer; a rank that is higher, or not one for a whole group; a state that cannot be
            cut, for it is in few bits or of an optimizer of which is not known what it keeps; a projected gradient that
            waits; or several processes. Nothing has changed then.

    Example:
        >>> from galore_torch import GaLoreAdamW
        >>> weight = torch.nn.Parameter(torch.randn(64, 32))
        >>> optimizer = GaLoreAdamW([{"params": [weight], "param_names": ["up.weight"], "rank": 16}])
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> lower_ranks(optimizer, {"up": 4})
        >>> optimizer.state[weight]["inner"]["exp_avg"].shape
        torch.Size([64, 4])
    """
    require_galore(optimizer)
    if is_one_of_several():
        raise ValueError(
            f"rank_pattern = {rank_pattern!r} in one of several processes, which lower no ranks; do it in one "
            "process, and resume from its checkpoint"
        )
    groups, saved = optimizer.param_groups, optimizer.state_dict()
    ranks = _of_groups(groups, rank_pattern)
    state, keys = dict(saved["state"]), chain.from_iterable(group["params"] for group in saved["param_groups"])
    by_weight = dict(zip(chain.from_iterable(group["params"] for group in groups), keys, strict=True))
    for index, rank in ranks.items():
        for weight in groups[index]["params"]:
            trained = optimizer._trained_weight(weight)
            if isinstance(weight.grad, ProjectedGradient):
                raise ValueError(
                    f"grad of {trained.name} waits at rank {groups[index]['rank']}; call zero_grad() first"
                )
            if by_weight[weight] in state:
                new = projection_in({**groups[index], "rank": rank}, weight)
                state[by_weight[weight]] = _cut(trained, new)
    before = {index: groups[index]["rank"] for index in ranks}
    lowered = [
        {**group, "rank": ranks[index]} if index in ranks else group
        for index, group in enumerate(saved["param_groups"])
    ]
    try:
        for index, rank in ranks.items():
            groups[index]["rank"] = rank
        optimizer.load_state_dict({**saved, "state": state, "param_groups": lowered})
    except ValueError:
        for index, rank in before.items():
            groups[index]["rank"] = rank
        raise


def _of_groups(groups: Sequence[dict[str, Any]], pattern: Mapping[str, int]) -> dict[int, int]:
    """The new ranks of those groups that have one, by their places."""
    unnamed = [at for at, group in enumerate(groups) if len(group.get("param_names", ())) != len(group["params"])]
    if unnamed:
        raise ValueError(
            f"parameter group {unnamed[0]} has no param_names, one for each parameter, by which ranks are lowered; "
            "give them"
        )
    by_name, found = ranks_of(groups, pattern), {}
    for index, group in enumerate(groups):
        if not is_projected(group):
            continue
        new = {name: by_name.get(name, group["rank"]) for name in group["param_names"]}
        if len({*new.values()}) > 1:
            raise ValueError(
                f"rank_pattern = {pattern!r} gives parameter group {index} ranks of {sorted({*new.values()})}; give "
                "one, or make the groups by param_groups(rank_pattern=...)"
            )
        name, rank = next(iter(new.items()))
        if rank > group["rank"]:
            raise ValueError(f"rank of {name} is {group['rank']}, which {rank} would not lower; give at most that")
        if rank < group["rank"]:
            found[index] = rank
    return found


def _cut(trained: TrainedWeight, new: Projection) -> dict[str, Any]:
    """A weight's state with the first directions alone."""
    state, old = dict(trained.state), trained.projection
    ranks = {mode.name: mode.rank for mode in new.modes}
    if ranks.keys() != {mode.name for mode in old.modes}:
        raise ValueError(
            f"rank of {trained.name}: at {min(ranks.values())} more of its axes would be projected, of {old.shape}, "
            "for which there is no basis; give a rank that is no less than the axes that are left as they are"
        )
    basis = {name: factor[..., : ranks[name]].clone() for name, factor in trained.basis.items()}
    state[BASIS] = trained.storage.store(basis)
    if state[LACKING]:
        missing, _ = lacking(basis)
        state[LACKING] = missing if state[LACKING] > 0 else -missing
    if INNER in state:
        kinds = moments_of(trained.rule)
        for name, value in state[INNER].items():
            numbers = type(value) is Tensor and (not value.dim() or (name in kinds and value.is_floating_point()))
            if isinstance(value, (Tensor, dict)) and not numbers:
                raise ValueError(
                    f"{trained.rule.name} keeps {name} of {trained.name} in few bits, or in a way that is "
                    f"not known, and it cannot be cut to rank {next(iter(ranks.values()))}; begin its state anew, by "
                    "optimizer.state.pop(weight) and another rank in its group"
                )
        state[INNER] = {name: _first(value, old, ranks) for name, value in state[INNER].items()}
    return state


def _first(value: Any, old: Projection, ranks: Mapping[str, int]) -> Any:
    if isinstance(value, Tensor) and value.dim():
        for mode in old.modes_in(value):
            value = value.narrow(mode.axis, 0, min(ranks[mode.name], mode.rank))
        value = value.clone(memory_format=torch.contiguous_format)
    return value
