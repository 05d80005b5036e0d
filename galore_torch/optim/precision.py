"""How updates are rounded into weights of 16 bits, and what is lost where moments have 16 bits themselves."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_torch.lowbit import ROUNDINGS, QuantizedWeight, Rounding
from galore_torch.messages import warn
from galore_torch.optim.groups import parameter_name
from galore_torch.optim.positions import positions
from galore_torch.optim.rule import InnerParam, Rule
from galore_torch.units import first_of

ASKED: dict[str, Rounding] = {
    "bf16_stochastic_round": "stochastic",
    "bf16_sr": "stochastic",
    "kahan_sum": "compensated",
}
"""Settings by which optimizers ask for more than rounding to the nearest of weights of 16 bits; None means yes, too."""


def is_16_bit(weight: Tensor) -> bool:
    """Whether it matters how an update is rounded into a weight."""
    return weight.element_size() == 2 and not isinstance(weight, QuantizedWeight)


def check_rounding(rounding: Any) -> None:
    """Checks the name of a rounding.

    Args:
        rounding: None, or one of `ROUNDINGS`.

    Raises:
        ValueError: it is none.
    """
    if rounding is not None and rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}; use one of {', '.join(ROUNDINGS)}")


def asked_rounding(rule: Rule, group: Mapping[str, Any]) -> Rounding:
    """How an optimizer's own settings ask that updates be rounded into weights of 16 bits.

    Args:
        rule: the optimizer.
        group: a parameter group.

    Returns:
        `nearest` if it does not ask.
    """
    for name, rounding in ASKED.items():
        value = rule.setting(name, group)
        if value is None or value:
            return rounding
    return "nearest"


def report_precision(
    rule: Rule, groups: Sequence[dict[str, Any]], rounding: Rounding | None, state_dtype: torch.dtype | None
) -> None:
    """Warns of a rounding that has no effect, and of an optimizer whose updates come out wrong with float16 state.

    Args:
        rule: the optimizer inside.
        groups: all parameter groups.
        rounding: as it was given.
        state_dtype: as it was given.
    """
    held = list(positions(groups))
    if rounding not in (None, "nearest") and not any(is_16_bit(place.weight) for place in held):
        dtypes = ", ".join(sorted({str(place.weight.dtype) for place in held}))
        warn(f"rounding={rounding!r} has no effect: no weight has 16 bits (they are {dtypes}). Leave it out")
    in_float16 = [place for place in held if place.weight.dtype is torch.float16]
    names = [parameter_name(place.group, place.index) for place in in_float16]
    if not names or state_dtype not in (None, torch.float16):
        return
    factor = _too_large_in_float16(rule)
    if not 0.9 < factor < 1.1:
        warn(
            f"the state of {len(names)} weights of float16 ({first_of(names)}) is kept in float16, where the squares "
            f"of small gradients vanish: at gradients of 1e-4 the updates of {rule.name} come out {factor:.2g} times "
            "as large as they should. Pass state_dtype=torch.float32, or use weights of bfloat16 or float32"
        )


def _too_large_in_float16(rule: Rule) -> float:
    """How much farther small gradients move a tensor of float16 than one of float32."""
    grad = 1e-4 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    lengths = []
    for dtype in (torch.float16, torch.float32):
        trial, moved, state = rule.on_cpu(), torch.zeros(64, 64), dict[str, Any]()
        group = dict(trial.defaults)
        for _ in range(3):
            tensor = torch.zeros(64, 64, dtype=dtype)
            params = InnerParam(tensor=tensor, grad=grad.to(dtype), state=state, group=group)
            with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                group.update(trial.step([params])[id(group)])
            moved += tensor.float()
        lengths.append(float(moved.norm()))
    return lengths[0] / lengths[1] if lengths[1] else 1.0
