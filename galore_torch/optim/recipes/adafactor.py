"""`GaLoreAdafactor`, and what Adafactor reads from the weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from galore_torch.lowbit import Rounding
from galore_torch.optim.galore import GaLore
from galore_torch.optim.rule import DECLARED, Traits, UpdateContext


class GaLoreAdafactor(GaLore):
    """GaLore around Adafactor (Shazeer and Stern 2018), with the arguments that Transformers' class has.

    torch's Adafactor runs inside. What it would read from the parameter is computed from the weight: the scale by its
    root mean square, the relative step, and decay.

    Args:
        params: parameters or groups; those with a `rank` are projected (see `GaLore`).
        lr: learning rate. None: the relative step, capped at 0.01.
        eps: added to the squared gradient; and the least root mean square of a weight.
        clip_threshold: updates of a larger root mean square are scaled down to it; at least 1.
        decay_rate: exponent of the second moment's decay, 1 - t^decay_rate.
        beta1: understood for callers of galore-torch 1.0; only None is supported.
        weight_decay: decay of the weight, times the rate it moves with.
        scale_parameter: times the weight's root mean square. None: only if `lr` is None.
        relative_step: at most 1/sqrt(t). None: only if `lr` is None.
        warmup_init: the relative step starts at 1e-6 t.
        maximize: go up instead of down.
        state_dtype: dtype of the coordinates and the factored moment; the weight's own when None.
        rounding: of updates into weights of 16 bits: `nearest`, `stochastic` or `compensated` (see `GaLore`).
        skip_nonfinite: leave out weights whose gradient is not finite.
        seed: of the decompositions' random numbers.

    Raises:
        ValueError: arguments that exclude each other, or a group that is not supported.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool | None = None,
        relative_step: bool | None = None,
        warmup_init: bool = False,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype | None = torch.float32,
        rounding: Rounding = "nearest",
        skip_nonfinite: bool = False,
        seed: int = 0,
    ) -> None:
        relative = lr is None if relative_step is None else relative_step
        if beta1 is not None:
            raise ValueError(f"beta1 is {beta1!r}: Adafactor keeps no first moment here. Use GaLoreAdamW for one")
        if lr is None and not relative:
            raise ValueError("lr is None and relative_step is False; give a learning rate")
        if lr is not None and relative:
            raise ValueError(f"lr is {lr!r} and relative_step is True; leave out one of them")
        if warmup_init and not relative:
            raise ValueError("warmup_init is True and relative_step is False; the warm-up is of the relative step")
        if len(eps) != 2 or not all(0 <= one < float("inf") for one in eps):
            raise ValueError(f"eps is {eps!r}; use two finite numbers of at least 0, as (1e-30, 1e-3)")
        if clip_threshold < 1:
            raise ValueError(f"clip_threshold is {clip_threshold!r}; use at least 1")
        super().__init__(
            params,
            optimizer_class=torch.optim.Adafactor,
            traits=dataclasses.replace(_ADAFACTOR, is_another=True),
            state_dtype=state_dtype,
            rounding=rounding,
            skip_nonfinite=skip_nonfinite,
            seed=seed,
            group_defaults={
                "scale_parameter": relative if scale_parameter is None else scale_parameter,
                "relative_step": relative,
                "warmup_init": warmup_init,
            },
            lr=1e-2 if lr is None else lr,
            beta2_decay=decay_rate,
            # torch puts a floor of eps1 squared under the second moment, where Transformers' class adds eps[0].
            eps=(eps[0] ** 0.5, eps[1]),
            d=clip_threshold,
            weight_decay=weight_decay,
            maximize=maximize,
        )


# Adafactor's rate depends on the weight's root mean square and on the number of the step. The rule inside moves
# coordinates at a rate so small that no cap acts on it, and the weight's own rate replaces it.
_UNIT_RATE = 1e-4


def _adafactor_rate(moved: UpdateContext) -> float | Tensor:
    """The rate a weight moves with: max(eps2, RMS(W)) * min(lr, 1 / sqrt(t))."""
    group, weight = moved.group, moved.weight
    rate = float(group["lr"])
    if group.get("relative_step", True):
        cap = 1e-6 * moved.step if group.get("warmup_init", False) else rate
        rate = min(cap, 1 / math.sqrt(moved.step))
    if not group.get("scale_parameter", True):
        return rate
    norm: Tensor = torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    return rate * (norm / math.sqrt(weight.numel())).clamp(min=group["eps"][1])


def _adafactor_factor(moved: UpdateContext) -> float | Tensor:
    return _adafactor_rate(moved) / _UNIT_RATE


def _adafactor_decay_rate(moved: UpdateContext) -> float | Tensor:
    """Transformers' class decays with the rate the weight moves with, torch's with the plain learning rate."""
    return _adafactor_rate(moved) if "relative_step" in moved.group else float(moved.group["lr"])


def _adafactor_given(group: Mapping[str, Any]) -> dict[str, Any]:
    return {"lr": _UNIT_RATE, "eps": (group["eps"][0], 1.0)}


_ADAFACTOR = Traits(
    decay="decoupled", learning_rate=_adafactor_decay_rate, factor=_adafactor_factor, given=_adafactor_given
)
DECLARED[f"{torch.optim.Adafactor.__module__}.Adafactor"] = _ADAFACTOR
