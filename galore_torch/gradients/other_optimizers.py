"""Refuses that an optimizer steps by gradients that are projected for another.

Nothing shows an optimizer, of torch or of this package, for whom the gradients of its weights were formed: a projected
one reads like a full one, and would move the weight within the other's subspace alone.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from galore_torch.optim.galore import GaLore
from galore_torch.optim.groups import parameter_name

_GUARDS: dict[int, Callable[[Optimizer, bool], None]] = {}
"""What looks at every optimizer that is about to step. The garbage collector may take one out at any moment, so that
they are no hooks of torch's own: it does not bear that among those that it is going through."""

_numbers = itertools.count()


def refuse_other_optimizers(optimizer: GaLore, weights: Iterable[Tensor], how: str) -> Callable[[], Any]:
    """Lets the step of any other optimizer raise an error where it would take the gradients of some weights.

    Those that wrap the optimizer are none of these: they share its groups, as SAM and Lookahead do, or keep it in an
    attribute or a list, as torchtitan's container does, which has groups of its own.

    Args:
        optimizer: for which the gradients are formed. It is held weakly, as its weights are.
        weights: whose gradients these are.
        how: they are formed, for the message.

    Returns:
        What ends it; the end of the optimizer does so too.
    """
    held, own = {id(weight): weakref.ref(weight) for weight in weights}, weakref.ref(optimizer)
    if not held:
        return lambda: None
    harmless: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # the one inside is asked in every step

    def check(other: Optimizer, computes_gradients: bool) -> None:
        ours = own()
        if ours is None or other is ours or other in harmless:
            return
        taken = [
            (group, index)
            for group in other.param_groups
            if not any(group is one for one in ours.param_groups)
            for index, weight in enumerate(group["params"])
            if id(weight) in held and held[id(weight)]() is weight
        ]
        if not taken or _keeps(other, ours):
            harmless.add(other)
            return
        for group, index in taken:
            if computes_gradients or group["params"][index].grad is not None:
                raise ValueError(
                    f"{type(other).__name__} holds {parameter_name(group, index)}, whose gradients are formed for "
                    f"another optimizer, a {type(ours).__name__} (attach, {how}), and would move it by what that one's "
                    "subspace holds. Call galore_torch.detach(model) and zero_grad(), and attach the model with the "
                    "optimizer that is to train it"
                )

    _look_before_steps()
    number = next(_numbers)
    _GUARDS[number] = check
    return weakref.finalize(optimizer, _GUARDS.pop, number)


def _keeps(other: Optimizer, optimizer: Optimizer) -> bool:
    """Whether an optimizer has another one in an attribute, or in a list of them, and so steps it in its own step."""
    kept = vars(other).values()
    lists = [one for one in kept if isinstance(one, (list, tuple))]
    return any(one is optimizer for one in itertools.chain(kept, *lists))


@functools.cache
def _look_before_steps() -> None:
    """Has torch call the guards, from the first one on; a step that is compiled cannot be looked at while it is."""

    def look(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        computes_gradients = any(map(callable, (*args[1:], *kwargs.values())))  # in a closure
        for guard in [*_GUARDS.values()]:
            guard(optimizer, computes_gradients)

    register_optimizer_step_pre_hook(look)
