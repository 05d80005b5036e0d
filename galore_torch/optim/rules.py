"""The one or two rules of an optimizer: one for what is projected, and perhaps another for the other parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from galore_torch.lowbit import QuantizedWeight, Rounding
from galore_torch.optim.arguments import share_arguments
from galore_torch.optim.groups import is_projected, projection_in
from galore_torch.optim.inner_group import check_decay, check_names, moves_at_rate_one
from galore_torch.optim.moments import require_moments
from galore_torch.optim.precision import asked_rounding, is_16_bit
from galore_torch.optim.probe import traits_of
from galore_torch.optim.rate import require_rate
from galore_torch.optim.rule import Rule, Traits


class Rules:
    """The rules of an optimizer, made from its settings.

    Args:
        settings: `optimizer_class`, `fallback_class`, `arguments`, `traits`, `state_dtype` and `rounding`, as `GaLore`
            takes them.

    Attributes:
        rule: what moves coordinates of projected weights.
        traits: what is known of it.
        fallback: what moves the other parameters, or their coordinates; the same rule where there is one class.
        fallback_traits: what is known of that.
        classes: of the rules.

    Raises:
        ValueError: a class or an argument that is not supported.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self.classes = [one for one in (settings["optimizer_class"], settings["fallback_class"]) if one is not None]
        self._shares = share_arguments(self.classes, settings["arguments"])
        self.rule = Rule(self.classes[0], self._shares[0])
        self.traits: Traits = settings["traits"] or traits_of(self.classes[0], self._shares[0])
        self.fallback, self.fallback_traits = self.rule, self.traits
        if len(self.classes) > 1:
            self.fallback = Rule(self.classes[-1], self._shares[-1])
            on_coordinates = settings["state_dtype"] is not None
            self.fallback_traits = traits_of(self.classes[-1], self._shares[-1], on_coordinates=on_coordinates)
        for rule in (self.rule, self.fallback):
            check_names(rule)

    def of(self, group: Mapping[str, Any]) -> tuple[Rule, Traits]:
        """The rule of a group, and what is known of it."""
        return (self.rule, self.traits) if is_projected(group) else (self.fallback, self.fallback_traits)

    def of_weight(self, weight: Tensor, group: Mapping[str, Any]) -> tuple[Rule, Traits, bool]:
        """The rule of one weight, what is known of it, and whether it moves coordinates of the weight.

        Without projection, coordinates are for another rule than the optimizer's own, a dtype of their own, codes, and
        roundings of ours.
        """
        rule, traits = self.of(group)
        in_codes = isinstance(weight, QuantizedWeight)
        is_rounded = self._settings["rounding"] not in (None, "nearest") and is_16_bit(weight)
        if (in_codes or is_rounded) and rule is not self.rule:
            traits = traits_of(self.classes[-1], self._shares[-1])
        has_own_dtype = self._settings["state_dtype"] is not None
        return rule, traits, is_projected(group) or traits.is_another or has_own_dtype or in_codes or is_rounded

    def rounding(self, weight: Tensor, group: Mapping[str, Any]) -> Rounding:
        """How a weight that moves through coordinates is rounded."""
        if not is_16_bit(weight):
            return "nearest"
        chosen: Rounding | None = self._settings["rounding"]
        return chosen or asked_rounding(self.of(group)[0], group)

    def check(self, group: Mapping[str, Any], weights: Sequence[Tensor]) -> None:
        """Checks that a group is supported: its weights' dimensions, and its decay where coordinates are moved.

        Args:
            group: with its defaults.
            weights: its parameters.

        Raises:
            ValueError: it cannot.
        """
        place = 0 if is_projected(group) else -1
        optimizer: type[Optimizer] = self.classes[place]
        require_moments(self.of(group)[0], group)
        if moves_at_rate_one(group):
            require_rate(self.of(group)[0], self.of(group)[1])
        for dimensions in sorted({len(projection_in(group, weight).projected_shape) for weight in weights}):
            _check_dimensions(optimizer, self._shares[place], dimensions)
        for rule, traits in {
            (rule, traits)
            for rule, traits, on_coordinates in (self.of_weight(weight, group) for weight in weights)
            if on_coordinates
        }:
            given = self._settings["traits"] is not None and rule is self.rule
            made_of = None if given else (optimizer, self._shares[place])
            check_decay(rule, traits, {**rule.defaults, **group}, made_of)


def _check_dimensions(optimizer: type[Optimizer], arguments: dict[str, Any], dimensions: int) -> None:
    """Checks that an optimizer takes tensors of so many dimensions.

    Args:
        optimizer: the class.
        arguments: for its constructor.
        dimensions: of the tensors that it would move.

    Raises:
        ValueError: it does not; the message says what to do.
    """
    try:
        Rule(optimizer, arguments, dimensions)
    except ValueError as error:
        raise ValueError(
            f"{optimizer.__name__} cannot hold a tensor of {dimensions} dimensions: {error}. For parameters that are "
            "not projected pass another class, such as fallback_class=torch.optim.AdamW; for projected ones change "
            "`layout`"
        ) from error
