"""`Rule`: any `torch.optim.Optimizer`, used as nothing but its update rule.

The optimizer is built once, on a tiny parameter, so that wrong arguments are told at once and its defaults are known.
For each call it is lent the tensors to move, their gradients, their state and their hyperparameters, and it keeps
none of them afterwards. So nothing is keyed on the identity of a parameter, nothing is copied when a checkpoint is
taken, and it never notices that what it moves are coordinates.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Decay = Literal["none", "l2", "decoupled"]


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A weight that is being moved, as the functions in `Traits` see it.

    Attributes:
        weight: the weight, before this step.
        group: its parameter group.
        step: the number of its step, from 1.
        coordinates_shape: the shape of its coordinates.
    """

    weight: Tensor
    group: Mapping[str, Any]
    step: int
    coordinates_shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What an optimizer does that its signature does not tell.

    Attributes:
        decay: where its `weight_decay` acts: on the gradient (`l2`), on the weight before the update (`decoupled`),
            or there is none.
        many_calls: whether stepping the parameters in several calls equals stepping them in one.
        learning_rate: the rate that decay takes, where that depends on the weight; the group's `lr` when left out.
        factor: a correction of the displacement, where that depends on the weight.
        given: hyperparameters that the rule gets instead of the group's, because `factor` takes their place.
        slice_elements: how many numbers of one tensor the rule may be lent at a time: slices that it moves as it would
            the whole, where it makes copies of what it is lent. All at once when None.
        holds_in_few_bits: of an optimizer with quantized state, whether it quantizes that of a tensor with so many
            elements; None for one without.
    """

    decay: Decay = "none"
    many_calls: bool = True
    learning_rate: Callable[[Moved], float | Tensor] | None = None
    factor: Callable[[Moved], float | Tensor] | None = None
    given: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    slice_elements: int | None = None
    holds_in_few_bits: Callable[[int], bool] | None = None

    @property
    def reads_weight(self) -> bool:
        """Whether every parameter, projected or not, must go through coordinates, because `factor` serves it."""
        return self.factor is not None


@dataclass(frozen=True, kw_only=True)
class Lent:
    """What a rule is lent for one tensor.

    Attributes:
        tensor: moved in place.
        grad: its gradient, of the same shape and dtype.
        state: the rule's own state of it, changed in place.
        group: the hyperparameters; what it lacks is as at construction.
    """

    tensor: Tensor
    grad: Tensor
    state: dict[str, Any]
    group: Mapping[str, Any]


DECLARED: dict[str, Traits] = {}
"""Traits by qualified class name, for optimizers that a probe cannot tell about. `recipes` fills it."""


class Rule:
    """An optimizer class and its arguments, as an update rule.

    Args:
        optimizer: the class.
        arguments: for its constructor, besides the parameters.
        dimensions: how many dimensions the tiny parameter has on which it is built.

    Attributes:
        defaults: its hyperparameters by name, as a parameter group holds them.

    Raises:
        TypeError, ValueError: the class' own complaints about its arguments.
    """

    def __init__(
        self, optimizer: type[torch.optim.Optimizer], arguments: Mapping[str, Any], dimensions: int = 2
    ) -> None:
        self.name = f"{optimizer.__module__}.{optimizer.__qualname__}"
        self._made_from = optimizer, arguments, dimensions
        tiny = torch.nn.Parameter(torch.zeros((2,) * dimensions))
        self._optimizer = optimizer([tiny], **arguments)
        self._template = {key: value for key, value in self._optimizer.param_groups[0].items() if key != "params"}
        # torchao holds the learning rate in a tensor. Ours stays the number that was passed, for schedulers to read.
        self.defaults = {key: _plain(value, arguments.get(key)) for key, value in self._template.items()}
        self._forget()

    def again(self) -> Rule:
        """The same rule made anew: what it is tried on leaves no trace in this one."""
        return Rule(*self._made_from)

    def step(self, lent: Sequence[Lent]) -> None:
        """Moves each tensor by the rule, and updates its state.

        Args:
            lent: the tensors with their gradients, states and groups. Those that share a group share the object.
        """
        parameters = [torch.nn.Parameter(one.tensor) for one in lent]
        by_group: dict[int, dict[str, Any]] = {}
        try:
            for one, parameter in zip(lent, parameters, strict=True):
                parameter.grad = one.grad
                if one.state:
                    self._optimizer.state[parameter] = one.state
                group = by_group.get(id(one.group))
                if group is None:
                    group = by_group[id(one.group)] = self._hyperparameters(one.group)
                group["params"].append(parameter)
            self._optimizer.param_groups = list(by_group.values())
            self._optimizer.step()
            for one, parameter in zip(lent, parameters, strict=True):
                state = self._optimizer.state.get(parameter, {})
                if state is not one.state:
                    one.state.clear()
                    one.state.update(state)
        finally:
            self._forget()

    def _hyperparameters(self, group: Mapping[str, Any]) -> dict[str, Any]:
        values = {key: _as_template(group.get(key, value), value) for key, value in self._template.items()}
        return {**values, "params": []}

    def _forget(self) -> None:
        self._optimizer.state = defaultdict(dict)
        self._optimizer.param_groups = []


def share_arguments(classes: Sequence[type[torch.optim.Optimizer]], arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Which of the arguments each of one or two classes gets: all, if there is one; else those that it names.

    Args:
        classes: the optimizers.
        arguments: for both, by name.

    Returns:
        One dictionary for each class.

    Raises:
        ValueError: an argument that neither class names.
    """
    if len(classes) == 1:
        return [arguments]
    shares = []
    for one in classes:
        named = inspect.signature(one).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in named.values())
        shares.append({key: value for key, value in arguments.items() if takes_any or key in named})
    unknown = arguments.keys() - shares[0].keys() - shares[1].keys()
    if unknown:
        both = " and ".join(one.__name__ for one in classes)
        raise ValueError(f"{both} have no argument named {', '.join(sorted(unknown))}; check the spelling")
    return shares


def check_dimensions(optimizer: type[torch.optim.Optimizer], arguments: dict[str, Any], dimensions: int) -> None:
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
            "not projected name another class, for example others=torch.optim.AdamW; for projected ones change `layout`"
        ) from error


def _plain(value: Any, passed: Any) -> Any:
    """A default as our groups hold it: a tensor only if a tensor was passed."""
    if isinstance(value, Tensor) and not isinstance(passed, Tensor):
        return value.item() if passed is None else passed
    return value


def _as_template(value: Any, template: Any) -> Any:
    """A hyperparameter in the form that the optimizer wants: in a tensor of its own if it made one at construction."""
    if isinstance(template, Tensor) and not isinstance(value, Tensor):
        return template.clone().fill_(value)
    return value
