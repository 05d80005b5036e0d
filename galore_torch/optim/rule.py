"""`Rule`: any `torch.optim.Optimizer`, used as nothing but its update rule.

The optimizer is built once, on a tiny parameter, so that wrong arguments raise at once and its defaults are known.
For each call it gets the tensors to move, their gradients, their state and their hyperparameters, and it keeps
none of them afterwards. So nothing is keyed on the identity of a parameter, nothing is copied when a checkpoint is
taken, and it never notices that what it moves are coordinates.

Many optimizers write into their parameter group: how many steps they have made, sums over all parameters, choices of
the first step. A call returns what it has written. A step may take several calls, all of which see the group as it was
before the step; what they have written is put there once, when the step is closed.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Decay = Literal["none", "l2", "decoupled", "unsupported"]


@dataclass(frozen=True, kw_only=True)
class UpdateContext:
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
    """What an optimizer does that its signature does not show.

    Attributes:
        decay: where its `weight_decay` acts: on the gradient (`l2`), on the weight before the update (`decoupled`),
            there is none, or it is one that cannot be applied to the weight from the weight (`unsupported`).
        many_calls: whether stepping the parameters in several calls equals stepping them in one.
        writes_group: whether it writes into its parameter group, also where none of its parameters has a gradient.
        learning_rate: the rate that decay takes, where that depends on the weight; the group's `lr` when left out.
        factor: a correction of the displacement of coordinates, where that depends on the weight.
        is_another: whether `factor` makes another rule of the optimizer, so that parameters that are not projected go
            through coordinates too. Without it the optimizer itself moves them.
        given: hyperparameters that the rule gets instead of the group's, because `factor` takes their place.
        slice_elements: how many numbers of one tensor of a CPU the rule may get at a time: slices that it moves as it
            would the whole, where it copies what it gets, and writes into their state. All at once when None.
        holds_in_few_bits: of an optimizer with quantized state, whether it quantizes that of a tensor with so many
            elements; None for one without.
        block: how many numbers of a tensor, one after the other, share a scale in quantized state of plain tensors, all
            of which are laid out as the tensor is, but for `common`; None where the state is not like that.
        common: names of the state that all blocks share.
    """

    decay: Decay = "none"
    many_calls: bool = True
    writes_group: bool = False
    learning_rate: Callable[[UpdateContext], float | Tensor] | None = None
    factor: Callable[[UpdateContext], float | Tensor] | None = None
    is_another: bool = False
    given: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    slice_elements: int | None = None
    holds_in_few_bits: Callable[[int], bool] | None = None
    block: int | None = None
    common: frozenset[str] = frozenset()


@dataclass(slots=True)
class InnerParam:
    """One tensor that a rule moves, as the rule gets it.

    Attributes:
        tensor: moved in place.
        grad: its gradient, of the same shape and dtype; None for one that is not moved.
        state: the rule's own state of it, changed in place.
        group: the hyperparameters; what it lacks is as at construction. The rule gets copies of its tensors.
        weight: whose coordinates the tensor is, or which it is; for optimizers that hold settings of single weights.
        is_fresh: whether the tensor is no one else's, so that it can be lent as it is.
    """

    tensor: Tensor
    grad: Tensor | None
    state: dict[str, Any]
    group: Mapping[str, Any]
    weight: Tensor | None = None
    is_fresh: bool = False


DECLARED: dict[str, Traits] = {}
"""Traits by qualified class name, for optimizers whose traits a probe cannot find out. `recipes` fills it."""

ELEMENTWISE: set[str] = set()
"""Qualified names of optimizers that move each number by its own gradient and state, and by how many steps its tensor
has made: tensors that have made as many may be one. `recipes` fills it."""

ADAPTED: dict[str, Callable[[torch.optim.Optimizer, Mapping[int, Tensor]], None]] = {}
"""What is done to a rule's optimizer that knows single weights by their identity, by the library that it comes from:
called once with the optimizer and with the weights behind what it gets, by the identity of that. `recipes` fills it.
"""


class Rule:
    """An optimizer class and its arguments, as an update rule.

    Args:
        optimizer: the class.
        arguments: for its constructor, besides the parameters.
        dimensions: how many dimensions the tiny parameter has on which it is built.

    Attributes:
        name: its qualified name.
        defaults: its hyperparameters by name, as a parameter group holds them.

    Raises:
        TypeError, ValueError: the class' own complaints about its arguments, or no class of an optimizer.
    """

    def __init__(
        self, optimizer: type[torch.optim.Optimizer], arguments: Mapping[str, Any], dimensions: int = 2
    ) -> None:
        if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
            raise ValueError(
                f"optimizer is {optimizer!r}; give a class of torch.optim.Optimizer, and its arguments by name"
            )
        self.name = f"{optimizer.__module__}.{optimizer.__qualname__}"
        self._class, self._arguments, self._dimensions = optimizer, dict(arguments), dimensions
        self._optimizer = self.alone([self._tiny()])
        self._is_born_with_state = bool(self._optimizer.state)
        if isinstance(getattr(type(self._optimizer), "state", None), property):
            raise ValueError(
                f"{self.name} cannot run inside GaLore: it holds another optimizer, whose state is out of reach. Use "
                "that optimizer itself"
            )
        self._template = {
            key: value for key, value in self._optimizer.param_groups[0].items() if key not in _OF_PARAMETERS
        }
        # torchao holds the learning rate in a tensor. Ours stays the number that was passed, for schedulers to read.
        self.defaults = {key: _plain(value, arguments.get(key)) for key, value in self._template.items()}
        self._weights: dict[int, Tensor] = {}
        libraries = {base.__module__.partition(".")[0] for base in optimizer.__mro__} & ADAPTED.keys()
        self._knows_weights = bool(libraries)
        for library in libraries:
            ADAPTED[library](self._optimizer, self._weights)
        self._forget()

    def alone(self, parameters: Sequence[Any]) -> torch.optim.Optimizer:
        """A new optimizer of the same class and arguments, that holds parameters as any does.

        Args:
            parameters: what it moves, or groups of it.

        Returns:
            The optimizer.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        try:
            made = self._class(parameters, **self._arguments)
            if callable(train := getattr(made, "train", None)):  # those that average have two modes
                train()
            return made
        except TypeError:
            raise
        except ValueError as error:
            raise ValueError(f"{self.name} does not take its arguments: {error}") from error
        except Exception as error:  # whatever a foreign class raises
            raise ValueError(
                f"{self.name} cannot run inside GaLore: it cannot be made for a list of parameters "
                f"({type(error).__name__}: {error})"
            ) from error

    def again(self) -> Rule:
        """The same rule as it is in another process: with nothing that the optimizer noted in itself."""
        return Rule(self._class, self._arguments, self._dimensions)

    def on_cpu(self) -> Rule:
        """The same, to be tried on tensors of the CPU: there is where tensors among the arguments are, too."""
        return Rule(self._class, on_cpu(self._arguments), self._dimensions)

    def setting(self, name: str, group: Mapping[str, Any]) -> Any:
        """A setting of the optimizer by its name, wherever it keeps it; False where it has none of this name.

        Args:
            name: of the setting.
            group: a parameter group, which says it first.
        """
        return group[name] if name in group else self.defaults.get(name, getattr(self._optimizer, name, False))

    def step(self, params: Sequence[InnerParam]) -> dict[int, dict[str, Any]]:
        """Moves each tensor by the rule, and updates its state.

        Args:
            params: the tensors with their gradients, states and groups. Those that share a group share the object.

        Returns:
            What the rule has written into each group, by the group's identity; the groups themselves do not change.
        """
        parameters = [one.tensor.requires_grad_() if one.is_fresh else torch.nn.Parameter(one.tensor) for one in params]
        try:
            groups = self._lend(params, parameters)
            before = {key: _noted(group) for key, group in groups.items()}
            self._optimizer.param_groups = list(groups.values())
            try:
                self._optimizer.step()
            except Exception:  # some complain that nothing is to be moved, after they have counted the step
                if any(one.grad is not None for one in params):
                    raise
            held = self._optimizer.state
            if len(held) != len(params) or not all(map(operator.is_, held.values(), [one.state for one in params])):
                for one, parameter in zip(params, parameters, strict=True):
                    state = held.get(parameter, {})
                    if state is not one.state:
                        one.state.clear()
                        one.state.update(state)
            return {key: _written(group, before[key]) for key, group in groups.items()}
        finally:
            self._forget()

    def _lend(self, params: Sequence[InnerParam], parameters: Sequence[Tensor]) -> dict[int, dict[str, Any]]:
        """Gives the optimizer gradients and states; at first a state is the one that it makes in its constructor."""
        groups: dict[int, dict[str, Any]] = {}
        for one, parameter in zip(params, parameters, strict=True):
            parameter.grad = one.grad
            if self._knows_weights and one.weight is not None:
                self._weights[id(parameter)] = one.weight
            if self._is_born_with_state and one.grad is not None and not one.state:
                one.state.update(self.alone([parameter]).state[parameter])
            if one.state or self._is_born_with_state:
                self._optimizer.state[parameter] = one.state
            group = groups.get(id(one.group))
            if group is None:
                group = groups[id(one.group)] = self.hyperparameters(one.group)
            group["params"].append(parameter)
        return groups

    def rest(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """What the rule writes into a group in a step in which no parameter of it has a gradient.

        Args:
            group: the hyperparameters.

        Returns:
            What it has written.
        """
        return self.step([InnerParam(tensor=self._tiny().data, grad=None, state={}, group=group)])[id(group)]

    def _tiny(self) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.zeros((2,) * self._dimensions))

    def hyperparameters(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A group as the optimizer wants it, without parameters: its tensors are copies, and numbers may be in tensors.

        Args:
            group: the hyperparameters; what it lacks is as at construction.

        Returns:
            Another group.
        """
        made, given = self._template, {**self._template, **group}
        values = {key: _as_template(value, made.get(key)) for key, value in given.items() if key not in _OF_PARAMETERS}
        return {**values, "params": []}

    def _forget(self) -> None:
        self._weights.clear()
        self._optimizer.state = defaultdict(dict)
        self._optimizer.param_groups = []


_OF_PARAMETERS = ("params", "param_names")
"""Keys of a group that hold its parameters, of which a rule may get some."""


def on_cpu(values: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters for a trial on tensors of the CPU, where a learning rate in a tensor of a GPU has no place.

    Args:
        values: by name.

    Returns:
        Another dictionary.
    """
    return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in values.items()}


def _noted(group: Mapping[str, Any]) -> dict[str, tuple[Any, int]]:
    """The values of a group, and how often those that are tensors have been changed in place."""
    return {key: (value, value._version if isinstance(value, Tensor) else 0) for key, value in group.items()}


def _written(group: Mapping[str, Any], before: Mapping[str, tuple[Any, int]]) -> dict[str, Any]:
    """What is another value than before, or a tensor that has been changed in place."""
    missing = (object(), 0)
    return {
        key: value
        for key, value in group.items()
        if value is not before.get(key, missing)[0] or (isinstance(value, Tensor) and value._version != before[key][1])
    }


def _plain(value: Any, passed: Any) -> Any:
    """A default as our groups hold it: a tensor only if a tensor was passed."""
    if isinstance(value, Tensor) and not isinstance(passed, Tensor):
        return value.item() if passed is None else passed
    return value


def _as_template(value: Any, template: Any) -> Any:
    """A hyperparameter as the optimizer wants it: a tensor if it made one, and then one of its own to write into."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(template, Tensor):
        return template.clone().fill_(value)
    return value
