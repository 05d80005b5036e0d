"""A parameter group as the optimizer inside sees it, and what that writes into it.

A step may take several calls of a rule: one for each chunk of weights, or one for each weight inside the backward pass.
All see the group as it was before the step. What they have written is put into the group once, when the step is closed,
as the optimizer alone would have written it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from galore_torch.group_keys import PROJECTED_DEFAULTS
from galore_torch.optim.groups import is_projected
from galore_torch.optim.probe import traits_of
from galore_torch.optim.rule import Rule, Traits
from galore_torch.optim.trained_weight import TrainedWeight

OURS = ("rank", *PROJECTED_DEFAULTS)
"""Keys of a projected group that mean nothing to the optimizer inside."""


def inner_group(group: Mapping[str, Any], traits: Traits) -> dict[str, Any]:
    """A group as the rule of its coordinates sees it: without decay and compensation, which act on the weight itself.

    Args:
        group: the parameter group.
        traits: of the rule.

    Returns:
        Another dictionary.
    """
    kept = {key: value for key, value in group.items() if key not in OURS}
    applied_here = {"weight_decay": 0.0, "kahan_sum": False}
    off = {key: value for key, value in applied_here.items() if key in group}
    rate = {"lr": 1.0} if moves_at_rate_one(group) else {}
    return {**kept, **off, **rate, **(traits.given(group) if traits.given else {})}


def moves_at_rate_one(group: Mapping[str, Any]) -> bool:
    """Whether the rule moves coordinates at a learning rate of 1, and the group's is applied to what is made of them.

    Residuals and normalized updates need what the rule makes of a gradient, also where the rate is 0 or changes.
    """
    return is_projected(group) and not (group.get("residual") is None and group.get("normalize") is None)


def set_inner_groups(firsts: Iterable[TrainedWeight]) -> None:
    """Lets the weights of groups have these as the rule is to see them in this step.

    Args:
        firsts: a weight of each; what it holds is what the others hold.
    """
    for one in firsts:
        if one.through_coordinates:
            now = inner_group(one.group, one.traits)
            one.inner_group.clear()
            one.inner_group.update(now)


class GroupWrites:
    """What rules have written into parameter groups in the step that is being made."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Mapping[str, Any], dict[str, Any]]] = {}

    def note(self, group: Mapping[str, Any], values: dict[str, Any]) -> None:
        """Keeps what a call has written.

        Args:
            group: the parameter group.
            values: by key.
        """
        self._kept[id(group)] = (group, values)

    def close(
        self, groups: Sequence[dict[str, Any]], rule_of: Callable[[Mapping[str, Any]], tuple[Rule, Traits]]
    ) -> None:
        """Puts everything into its group.

        Args:
            groups: all of the optimizer's.
            rule_of: the rule of a group, which is asked what it writes into one that no call has seen: some count their
                steps there too.
        """
        for group in groups:
            if id(group) in self._kept:
                group.update(self._kept[id(group)][1])
                continue
            rule, traits = rule_of(group)
            if traits.writes_group and group["params"]:
                group.update(rule.rest(inner_group(group, traits) if is_projected(group) else group))
        self._kept.clear()


def check_names(rule: Rule) -> None:
    """Checks that no setting of an optimizer has the name of a key by which GaLore's groups say how they are projected.

    Args:
        rule: the optimizer.

    Raises:
        ValueError: one has; the message names the optimizer and the settings.
    """
    shared = [key for key in OURS if key in rule.defaults]
    if shared:
        raise ValueError(
            f"{rule.name} cannot run inside GaLore: its setting {', '.join(shared)} has the name of a key that says "
            "how a group is projected. Use an optimizer that does not project by itself, such as torch.optim.AdamW"
        )


def check_decay(
    rule: Rule,
    traits: Traits,
    group: Mapping[str, Any],
    made_of: tuple[type[torch.optim.Optimizer], Mapping[str, Any]] | None,
) -> None:
    """Checks that the decay of a group whose coordinates are moved can be applied to the weight.

    Args:
        rule: the optimizer.
        traits: what is known of it.
        group: with its defaults.
        made_of: the class and its arguments, to find out what the group's own switches change; None where the traits
            were given.

    Raises:
        ValueError: it cannot; the message names optimizer, value and remedy.
    """
    if not group.get("weight_decay", 0):
        return
    own = {
        key: value
        for key, value in group.items()
        if isinstance(value, (bool, str)) and key in rule.defaults and value != rule.defaults[key]
    }
    decay = traits.decay
    if own and made_of:
        with suppress(TypeError):  # no arguments of these names
            decay = traits_of(made_of[0], {**made_of[1], **own}).decay
    if decay == "unsupported":
        raise ValueError(
            f"weight_decay is {group['weight_decay']!r} in a group whose coordinates are moved, and {rule.name} decays "
            "neither by L2 (on the gradient) nor decoupled (lr * weight_decay * weight), so that it is not supported "
            "from the weight. Set weight_decay=0.0 there"
        )
    if decay != traits.decay:
        raise ValueError(
            f"a group with weight_decay {group['weight_decay']!r} sets {own}, which makes the decay of {rule.name} "
            f"{decay}; that of the optimizer is {traits.decay}. Give {', '.join(own)} to the optimizer, for all groups"
        )
