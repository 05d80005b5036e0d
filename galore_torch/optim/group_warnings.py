"""Warnings of what has no effect in parameter groups, given once when the optimizer takes them."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from galore_torch.group_keys import KEYS
from galore_torch.messages import list_names, nearest, warn
from galore_torch.optim.groups import is_projected, is_trainable, parameter_name, projection_in

_OF_FRAMEWORKS = frozenset(
    """
    params param_names name names group_name label tag type layer layer_id layer_name layer_names module_names depth
    stage initial_lr lr lr_scale lr_mult lr_multiplier lr_ratio base_lr min_lr max_lr swa_lr step initial_step
    weight_decay initial_weight_decay wd_scale wd_mult weight_decay_mult decay_mult no_weight_decay apply_weight_decay
    base_momentum max_momentum momentum foreach fused capturable differentiable maximize decoupled_weight_decay
    is_expert is_expert_parallel is_decoupled_lr moe use_muon
    """.split()  # noqa: SIM905 (a list of as many lines as words otherwise)
)
"""Keys that schedulers and frameworks write into groups for themselves."""

_OURS_ALONE = tuple(name for name in KEYS if "_" in name or name == "rank")
"""Keys that mean nothing but a projection; the others are words that a group may have for reasons of its own."""


def report_all(groups: Sequence[dict[str, Any]]) -> None:
    """Warns if an optimizer projects nothing: it then trains as the plain one does.

    An optimizer of a single parameter is one of many, each for its own parameter, and is not meant.

    Args:
        groups: all of its groups.

    Raises:
        ValueError: all parameters are codes of quantized layers, which no gradient ever reaches.
    """
    weights = [weight for group in groups for weight in group["params"]]
    projected = [weight for group in groups if is_projected(group) for weight in group["params"]]
    if weights and not any(map(is_trainable, weights)):
        raise ValueError(
            f"all {len(weights)} parameters are frozen codes of quantized layers ({weights[0].dtype}), which cannot be "
            "trained. Load the model without quantization (quantize_weights keeps INT8 weights that can be trained), "
            "or leave them out"
        )
    if len(weights) == 1 or any(weight.requires_grad for weight in projected):
        return
    if not projected:
        warn(
            "no parameter group has a `rank`, so nothing is projected: this trains as the optimizer without GaLore. "
            "Make the groups by param_groups(model, rank=128), or give one a rank"
        )
    else:
        warn(
            f"the {len(projected)} parameters of groups with a `rank` are frozen ({projected[0].dtype}), so nothing is "
            "projected. Set requires_grad on them, or choose others; codes of a quantized layer cannot be trained"
        )


def report_each(groups: Sequence[dict[str, Any]], read: Collection[str], classes: Iterable[type]) -> None:
    """Warns of what has no effect in single groups.

    Args:
        groups: with their defaults filled in.
        read: the keys that the optimizer reads.
        classes: of the optimizers inside, which may read what their constructors name.
    """
    named = {name for one in classes for name in inspect.signature(one).parameters}
    _report_unread(groups, {*read, *named} - {"self", "params", "args", "kwargs"})
    _report_wasteful(groups)


def _report_unread(groups: Sequence[dict[str, Any]], read: Collection[str]) -> None:
    """Warns of keys that nothing reads, with the nearest name that is read.

    In a group without a `rank` only keys of a projection are reported: others may be the user's own.
    """
    known = {*KEYS, *read, *_OF_FRAMEWORKS}
    unread = []
    for group in groups:
        rank = f"the projected group (rank {group['rank']})" if is_projected(group) else "a group without `rank`"
        for key, value in group.items():
            if not is_projected(group):
                meant = key if key in _OURS_ALONE else None if key in known else nearest(key, _OURS_ALONE, 0.75)
                if meant is not None:
                    hint = "give the group a `rank`" if meant == key else f"did you mean {meant}?"
                    unread.append(f"{key}={reprlib.repr(value)} in {rank} ({hint})")
            elif key not in known and not key.startswith("_"):
                meant = nearest(key, [*KEYS, *read])
                hint = f"did you mean {meant}?" if meant else f"it may have {', '.join(KEYS)}"
                unread.append(f"{key}={reprlib.repr(value)} in {rank} ({hint})")
    if unread:
        warn(f"no effect: {'; '.join(dict.fromkeys(unread))}")


def _report_wasteful(groups: Sequence[dict[str, Any]]) -> None:
    """Warns of weights whose rank is so high that projecting them saves no memory."""
    projected = [
        (parameter_name(group, index), group["rank"], projection_in(group, weight))
        for group in groups
        if is_projected(group)
        for index, weight in enumerate(group["params"])
        if weight.is_floating_point()
    ]
    wasteful = [(name, rank) for name, rank, projection in projected if projection.saves_nothing]
    if wasteful:
        ranks = ", ".join(map(str, sorted({rank for _, rank in wasteful})))
        warn(
            f"rank {ranks} saves no memory for {len(wasteful)} of {len(projected)} projected weights "
            f"({list_names([name for name, _ in wasteful], 3)}): basis and moments take as much as plain ones. Lower "
            "the rank, or leave them out of the group"
        )
