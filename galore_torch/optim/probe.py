"""Finding out, on a few numbers, whether an optimizer can run on coordinates, and what it does with its decay.

An optimizer is supported when the rule that gets all from outside does bit for bit what the optimizer does alone, also
where it is rebuilt half-way from a checkpoint, and when its displacement depends on gradient and state alone:
coordinates are zero before each step, so that what reads the parameter (scaling by its norm, trust ratios, averages of
it, the distance from its start) would compute with those zeros. The rest raises an error that names it. `recipes`
declares the few optimizers that need help or take long to try.
"""

from __future__ import annotations

import functools
import io
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from galore_torch.optim.rule import DECLARED, Decay, InnerParam, Rule, Traits, on_cpu

STEPS = 30
"""RAdam shows what it is after five, averages of the weight after as many, preconditioners after ten."""
ROWS, COLUMNS = 8, 8  # square, so that no direction of either side is without a gradient
TOLERANCE = 1e-5
"""How far two ways may lie apart, of the way."""
ROUNDING = 5e-6
"""How far apart float32 alone puts two ends of so many small steps."""
DTYPES = (torch.float64, torch.float32)
"""The first finds more, and not all take it; some compute in the second whatever they are given."""
MOVED = 1e-2
"""The shortest displacement that shows anything."""
DECAY = 0.1
DECAY_TOLERANCE = 1e-3
"""The same of two ways that differ in the order of decay and update."""
SHAPE_TOLERANCE = 1e-3
"""The same of two ways that differ in what is summed up with zeros; those of another size are far apart."""
RATES = (1e-3, 1.0)
"""The first is small, so that the order of decay and update shows only in second order; some move at none but the last.
"""
NEUTRAL: dict[str, Any] = {
    "weight_decay": 0.0,
    "capturable": False,  # asks for an accelerator
}
"""Hyperparameters that hold during the probe, where the optimizer has them."""


def traits_of(
    optimizer: type[torch.optim.Optimizer], arguments: Mapping[str, Any], *, on_coordinates: bool = True
) -> Traits:
    """What an optimizer does: as declared, or as a probe finds. The same question is not probed twice.

    Args:
        optimizer: the class.
        arguments: for its constructor, besides the parameters.
        on_coordinates: whether it moves coordinates; weights themselves when False, which more can.

    Returns:
        Its traits.

    Raises:
        ValueError: it cannot run inside GaLore; see `probe`.
    """
    declared = DECLARED.get(f"{optimizer.__module__}.{optimizer.__qualname__}")
    if declared is not None:
        return declared
    arguments = on_cpu(arguments)
    try:
        # A class is hashable whatever its instances are.
        return _probed(optimizer, frozenset(arguments.items()), on_coordinates)  # type: ignore[arg-type]
    except TypeError:  # an argument that cannot be a key
        return probe(Rule(optimizer, arguments), on_coordinates)


@functools.lru_cache(maxsize=32)
def _probed(
    optimizer: type[torch.optim.Optimizer], arguments: frozenset[tuple[str, Any]], on_coordinates: bool
) -> Traits:
    return probe(Rule(optimizer, dict(arguments)), on_coordinates)


def probe(rule: Rule, on_coordinates: bool = True) -> Traits:
    """What an optimizer's rule does, by trying it.

    Args:
        rule: the optimizer.
        on_coordinates: whether it moves coordinates; weights themselves when False.

    Returns:
        Its traits; without its decay, where it moves weights themselves and decays them itself.

    Raises:
        ValueError: it keeps something outside of its state and its group, or something that a checkpoint cannot hold;
            its displacement depends on the parameter's own value or on its shape; it needs a closure, or does with one
            what it does not without; or it did not move, so that nothing can be found out. The message names the
            optimizer.

    Example:
        >>> probe(Rule(torch.optim.SGD, {"lr": 0.1})).decay
        'l2'
    """
    generator = torch.Generator().manual_seed(0)
    # Gradients that agree in part: those who estimate a distance see one.
    weight, common, *own = (torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(STEPS + 2))
    grads = [common + one for one in own]
    with torch.no_grad(), _undisturbed():
        try:
            trial = _first_that_moves(rule, weight, grads)
            wrote = trial.refuse_what_is_kept_elsewhere()
            trial.refuse_closures()
            if not on_coordinates:
                trial.refuse_what_is_kept_of_groups(apart=False)
                return Traits(many_calls=trial.allows_many_calls(), writes_group=wrote)
            trial.refuse_value_dependence()
            trial.refuse_shape_dependence()
            trial.refuse_what_is_kept_of_groups()
            return Traits(decay=trial.find_decay(), many_calls=trial.allows_many_calls(), writes_group=wrote)
        except _RefusedError as refused:
            raise ValueError(f"{rule.name} cannot run inside GaLore: {refused}") from None
        except Exception as error:  # whatever a foreign optimizer raises
            raise ValueError(
                f"{rule.name} cannot run inside GaLore: on a small matrix it raised {type(error).__name__}: {error}"
            ) from error


class _RefusedError(Exception):
    """Why an optimizer is not supported."""


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No warnings, and torch's and Python's random numbers as they were."""
    state = random.getstate()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(state)


def _seed() -> None:
    """Lets every way begin with the same random numbers: those of the CPU, where it is tried."""
    torch.default_generator.manual_seed(0)
    random.seed(0)


def _first_that_moves(rule: Rule, weight: Tensor, grads: Sequence[Tensor]) -> _Trial:
    """The trial at the first rate at which the optimizer moves, in float64 if it takes it."""
    rates = RATES if "lr" in rule.defaults else RATES[:1]
    for dtype in DTYPES:
        try:
            for rate in rates:
                trial = _Trial(rule, weight.to(dtype), [grad.to(dtype) for grad in grads], rate)
                if (trial.alone - trial.weight).norm() > MOVED:
                    return trial
            break
        except Exception:  # whatever a foreign optimizer raises
            if dtype is DTYPES[-1]:
                raise
    raise _RefusedError(
        f"in {STEPS} steps on a small matrix it did not move, so that what it does cannot be found out. Use an "
        "optimizer that moves by its gradients from the first steps on, such as torch.optim.AdamW"
    )


class _Trial:
    """One optimizer that moves one weight by the same gradients in several ways.

    Each way begins with a new rule, and with the same random numbers.
    """

    def __init__(self, rule: Rule, weight: Tensor, grads: Sequence[Tensor], rate: float) -> None:
        self.rule, self.weight, self.grads = rule, weight, grads
        held = {**NEUTRAL, "lr": rate}
        self.group = {**rule.defaults, **{key: value for key, value in held.items() if key in rule.defaults}}
        self.alone = self._moved_alone()

    def _moved_alone(self, closure: Callable[[int], Any] | None = None, **overrides: Any) -> Tensor:
        """The weight after the steps of the optimizer itself, each with its own closure if there is one."""
        _seed()
        parameter = torch.nn.Parameter(self.weight.clone())
        optimizer = self.rule.alone([parameter])
        group = optimizer.param_groups[0]
        for key, value in {**self.group, **overrides}.items():
            is_held_in_tensor = isinstance(group[key], Tensor) and not isinstance(value, Tensor)
            group[key] = torch.full_like(group[key], value) if is_held_in_tensor else value
        for step, grad in enumerate(self.grads):
            parameter.grad = grad.clone()
            optimizer.step(functools.partial(closure, step)) if closure else optimizer.step()
        return parameter.detach()

    def refuse_what_is_kept_elsewhere(self) -> bool:
        """What neither the rule gets nor a checkpoint holds would be lost: it is rebuilt half-way from one.

        Returns:
            Whether the rule has written into its group.
        """
        _seed()
        rule, weight, group, wrote = self.rule.again(), self.weight.clone(), dict(self.group), False
        state: dict[str, Any] = {}
        for step, grad in enumerate(self.grads):
            if step == STEPS // 2:
                rule = self.rule.again()
                state, group = _saved_and_loaded(state), _saved_and_loaded(group)
            written = rule.step([InnerParam(tensor=weight, grad=grad.clone(), state=state, group=group)])[id(group)]
            group.update(written)
            wrote = wrote or bool(written)
        if not torch.equal(weight, self.alone):
            raise _RefusedError(_KEPT_ELSEWHERE)
        return wrote

    def refuse_what_is_kept_of_groups(self, apart: bool = True) -> None:
        """A rule is made on one group, and gets as many as there are, each with its own rate if they are `apart`."""
        _seed()
        weights = [torch.nn.Parameter(self.weight.clone()) for _ in range(2)]
        groups = [dict(self.group), dict(self.group)]
        if apart and "lr" in self.group:
            groups[1]["lr"] /= 2
        optimizer = self.rule.alone(
            [
                {**self.rule.hyperparameters(group), "params": [weight]}
                for weight, group in zip(weights, groups, strict=True)
            ]
        )
        for grad in self.grads:
            for weight in weights:
                weight.grad = grad.clone()
            optimizer.step()
        _seed()
        rule, params = self.rule.again(), [self.weight.clone() for _ in range(2)]
        states: list[dict[str, Any]] = [{}, {}]
        for grad in self.grads:
            lots = zip(params, states, groups, strict=True)
            written = rule.step([InnerParam(tensor=one, grad=grad.clone(), state=s, group=g) for one, s, g in lots])
            for group in groups:
                group.update(written[id(group)])
        if not all(torch.equal(one, weight) for one, weight in zip(params, weights, strict=True)):
            raise _RefusedError(_KEPT_ELSEWHERE)

    def refuse_closures(self) -> None:
        """The optimizer inside gets no closure, so that what it would read from the loss is lost."""
        try:
            informed = self._moved_alone(lambda step: torch.tensor(float(step % 3)))
        except TypeError:  # its step takes none
            return
        if not torch.equal(informed, self.alone):
            raise _RefusedError(
                "its update depends on the loss that a closure returns, and inside it gets no closure. Use an "
                "optimizer that follows from gradients, such as torch.optim.AdamW"
            )

    def _moved_by_coordinates(self, decay: Decay = "none", pad: Sequence[int] = ()) -> Tensor:
        """The weight after the steps, moved through coordinates that are zero before each, decay applied to it."""
        _seed()
        rule, group = self.rule.again(), dict(self.group)
        weight = torch.nn.functional.pad(self.weight, pad)
        state: dict[str, Any] = {}
        sign = -1 if group.get("maximize") else 1
        for grad in self.grads:
            projected = torch.nn.functional.pad(grad, pad)
            projected = projected.add(weight, alpha=sign * DECAY) if decay == "l2" else projected.clone()
            coordinates = torch.zeros_like(weight)
            group.update(
                rule.step([InnerParam(tensor=coordinates, grad=projected, state=state, group=group)])[id(group)]
            )
            if decay == "decoupled":
                weight = weight * (1 - group["lr"] * DECAY)
            weight = weight + coordinates
        return weight[:ROWS, :COLUMNS]

    def _close(self, one: Tensor, other: Tensor, tolerance: float = TOLERANCE) -> bool:
        return bool((one - other).norm() <= tolerance * (one - self.weight).norm() + ROUNDING)

    def refuse_value_dependence(self) -> None:
        """Coordinates are zero before each step, and the parameter is not."""
        if not self._close(self.alone, self._moved_by_coordinates()):
            raise _RefusedError(
                "its update depends on the value of the parameter (as scaling by the parameter's norm, trust ratios, "
                "averages of the parameter and the distance from its start do), and coordinates are zero before each "
                "step. Use an optimizer whose update follows from gradient and state, such as torch.optim.AdamW"
            )

    def refuse_shape_dependence(self) -> None:
        """Rows and columns of zeros around a gradient must change nothing: a projected gradient has fewer."""
        for padding in ((0, COLUMNS), (0, 0, 0, ROWS)):
            if not self._close(self.alone, self._moved_by_coordinates(pad=padding), SHAPE_TOLERANCE):
                raise _RefusedError(
                    "the size of its update depends on the shape of the parameter, and a projected gradient "
                    "is smaller than the weight. Use an optimizer without that, such as torch.optim.AdamW"
                )

    def find_decay(self) -> Decay:
        """Whether decay is L2, decoupled, or neither, so that it cannot be applied to the weight."""
        if "weight_decay" not in self.rule.defaults:
            return "none"
        decayed = self._moved_alone(weight_decay=DECAY)
        candidates: tuple[Decay, ...] = ("decoupled", "l2") if "lr" in self.rule.defaults else ("l2",)
        ends = {decay: self._moved_by_coordinates(decay) for decay in candidates}
        nearest = min(candidates, key=lambda decay: float((ends[decay] - decayed).norm()))
        return nearest if self._close(decayed, ends[nearest], DECAY_TOLERANCE) else "unsupported"

    def allows_many_calls(self) -> bool:
        """Whether two tensors that are moved in two calls end where they end in one."""
        ends = []
        for in_one_call in (True, False):
            _seed()
            rule, group = self.rule.again(), dict(self.group)
            weights = [self.weight.clone(), self.weight.clone()]
            states: list[dict[str, Any]] = [{}, {}]
            for grad in self.grads:
                params = [
                    InnerParam(tensor=weights[i], grad=each.clone(), state=states[i], group=group)
                    for i, each in enumerate((grad, 2 * grad.flip(0)))
                ]
                written: dict[str, Any] = {}
                for call in [params] if in_one_call else [[one] for one in params]:
                    written.update(rule.step(call)[id(group)])
                group.update(written)
            ends.append(torch.stack(weights))
        return torch.equal(*ends)


def _saved_and_loaded(values: dict[str, Any]) -> dict[str, Any]:
    """State or a group, by way of a checkpoint."""
    file = io.BytesIO()
    try:
        torch.save(values, file)
        file.seek(0)
        loaded: dict[str, Any] = torch.load(file, weights_only=True)
    except Exception as error:  # whatever the pickling of a foreign object raises
        kinds = sorted({type(leaf).__name__ for leaf in tree_leaves(values) if not isinstance(leaf, _KEPT)})
        raise _RefusedError(f"its state holds what a checkpoint cannot ({', '.join(kinds) or error})") from error
    return loaded


_KEPT_ELSEWHERE = (
    "moved by its state and its parameter group alone, and resumed from them, it ends elsewhere than by itself: it "
    "keeps something in another place, which would be lost. Use an optimizer that keeps all in its state, such as "
    "torch.optim.AdamW"
)
_KEPT = (Tensor, int, float, str, type(None))
