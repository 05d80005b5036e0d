"""Finding out, on a few numbers, whether an optimizer can run on coordinates, and what it does with its decay.

Coordinates are zero before each step. An optimizer is served when its displacement depends on gradient and state
alone; the rest (scaling by the parameter's norm, trust ratios, averages of the parameter) would compute with those
zeros, and is refused by name. `recipes` declares the few optimizers that need help or take long to try.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_torch.optim.rule import DECLARED, Decay, Lent, Rule, Traits

STEPS = 8
"""RAdam, for one, shows what it is only after five."""
ROWS, COLUMNS = 8, 6
TOLERANCE = 1e-4
DECAY = 0.1
NEUTRAL: dict[str, Any] = {
    "lr": 1e-3,  # small, so that the order of decay and update shows only in second order
    "weight_decay": 0.0,
    "capturable": False,  # asks for an accelerator
}
"""Hyperparameters that hold during the probe, where the optimizer has them."""


def traits_of(optimizer: type[torch.optim.Optimizer], arguments: Mapping[str, Any]) -> Traits:
    """What an optimizer does: as declared, or as a probe finds. The same question is not probed twice.

    Args:
        optimizer: the class.
        arguments: for its constructor, besides the parameters.

    Returns:
        Its traits.

    Raises:
        ValueError: it cannot run inside GaLore; see `probe`.
    """
    declared = DECLARED.get(f"{optimizer.__module__}.{optimizer.__qualname__}")
    if declared is not None:
        return declared
    # The few numbers of the probe are on the CPU, and so must be a learning rate that is a tensor on a GPU.
    arguments = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in arguments.items()}
    try:
        # A class is hashable whatever its instances are.
        return _probed(optimizer, frozenset(arguments.items()))  # type: ignore[arg-type]
    except TypeError:  # an argument that cannot be a key
        return probe(Rule(optimizer, arguments))


@functools.lru_cache(maxsize=32)
def _probed(optimizer: type[torch.optim.Optimizer], arguments: frozenset[tuple[str, Any]]) -> Traits:
    return probe(Rule(optimizer, dict(arguments)))


def probe(rule: Rule) -> Traits:
    """What an optimizer's rule does, by trying it.

    Args:
        rule: the optimizer.

    Returns:
        Its traits.

    Raises:
        ValueError: its displacement depends on the parameter's own value or on its shape, it needs a closure, or its
            decay is neither L2 nor decoupled; the message names the optimizer.

    Example:
        >>> probe(Rule(torch.optim.SGD, {"lr": 0.1})).decay
        'l2'
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    grads = [torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(STEPS)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _refuse_value_dependence(rule, weight, grads)
        _refuse_shape_dependence(rule, weight, grads)
        return Traits(decay=_find_decay(rule, weight, grads), many_calls=_many_calls(rule, weight, grads))


def _group(rule: Rule, **overrides: Any) -> dict[str, Any]:
    wanted = {**NEUTRAL, **overrides}
    return {**rule.defaults, **{key: value for key, value in wanted.items() if key in rule.defaults}}


def _moved_directly(rule: Rule, weight: Tensor, grads: Sequence[Tensor], **overrides: Any) -> Tensor:
    """The weight after the steps, as the optimizer itself moves it."""
    weight, group = weight.clone(), _group(rule, **overrides)
    state: dict[str, Any] = {}
    for grad in grads:
        rule.step([Lent(tensor=weight, grad=grad.clone(), state=state, group=group)])
    return weight


def _moved_by_coordinates(
    rule: Rule, weight: Tensor, grads: Sequence[Tensor], decay: Decay = "none", **overrides: Any
) -> Tensor:
    """The weight after the steps, moved through coordinates that are zero before each, with the decay served."""
    weight, group = weight.clone(), _group(rule, **overrides)
    state: dict[str, Any] = {}
    sign = -1 if group.get("maximize") else 1
    for grad in grads:
        image = grad.add(weight, alpha=sign * DECAY) if decay == "l2" else grad.clone()
        coordinates = torch.zeros_like(weight)
        rule.step([Lent(tensor=coordinates, grad=image, state=state, group=group)])
        if decay == "decoupled":
            weight *= 1 - group["lr"] * DECAY
        weight += coordinates
    return weight


def _close(one: Tensor, other: Tensor, start: Tensor) -> bool:
    return bool((one - other).norm() <= TOLERANCE * (one - start).norm() + 1e-7)


def _refuse_value_dependence(rule: Rule, weight: Tensor, grads: Sequence[Tensor]) -> None:
    try:
        direct = _moved_directly(rule, weight, grads)
        through_coordinates = _moved_by_coordinates(rule, weight, grads)
    except Exception as error:  # whatever a foreign optimizer raises
        raise ValueError(
            f"{rule.name} cannot run inside GaLore: on a small matrix it raised {type(error).__name__}: {error}"
        ) from error
    if not _close(direct, through_coordinates, weight):
        raise ValueError(
            f"{rule.name} cannot run inside GaLore: its update depends on the value of the parameter (as scaling by "
            "the parameter's norm, trust ratios and averages of the parameter do), and coordinates are zero before "
            "each step. Use an optimizer whose update follows from gradient and state, such as torch.optim.AdamW"
        )


def _refuse_shape_dependence(rule: Rule, weight: Tensor, grads: Sequence[Tensor]) -> None:
    """Rows and columns of zeros around a gradient must change nothing: the image is smaller than the gradient."""
    pad = torch.nn.functional.pad
    plain = _moved_by_coordinates(rule, weight, grads)
    for padding in ((0, COLUMNS), (0, 0, 0, ROWS)):
        padded = _moved_by_coordinates(rule, pad(weight, padding), [pad(grad, padding) for grad in grads])
        if not _close(plain, padded[:ROWS, :COLUMNS], weight):
            raise ValueError(
                f"{rule.name} cannot run inside GaLore: the size of its update depends on the shape of the parameter, "
                "and the image is smaller than the weight. Use an optimizer without that, such as torch.optim.AdamW"
            )


def _find_decay(rule: Rule, weight: Tensor, grads: Sequence[Tensor]) -> Decay:
    if "weight_decay" not in rule.defaults:
        return "none"
    decayed = _moved_directly(rule, weight, grads, weight_decay=DECAY)
    candidates: tuple[Decay, ...] = ("decoupled", "l2") if "lr" in rule.defaults else ("l2",)
    ends = {decay: _moved_by_coordinates(rule, weight, grads, decay) for decay in candidates}
    nearest = min(candidates, key=lambda decay: float((ends[decay] - decayed).norm()))
    if _close(decayed, ends[nearest], weight):
        return nearest
    raise ValueError(
        f"{rule.name} cannot run inside GaLore: its weight decay is neither L2 (on the gradient) nor decoupled (lr * "
        "weight_decay * weight), so it cannot be served from the weight"
    )


def _many_calls(rule: Rule, weight: Tensor, grads: Sequence[Tensor]) -> bool:
    """Whether two tensors moved in two calls end where they end in one."""
    group = _group(rule)
    ends = []
    for in_one_call in (True, False):
        weights = [weight.clone(), weight.clone()]
        states: list[dict[str, Any]] = [{}, {}]
        for grad in grads:
            lent = [
                Lent(tensor=weights[i], grad=each.clone(), state=states[i], group=group)
                for i, each in enumerate((grad, 2 * grad.flip(0)))
            ]
            for call in [lent] if in_one_call else [[one] for one in lent]:
                rule.step(call)
        ends.append(torch.stack(weights))
    return torch.equal(*ends)
