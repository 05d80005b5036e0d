"""`GaLoreSGD`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from galore_torch.lowbit import Rounding
from galore_torch.optim.galore import GaLore


class GaLoreSGD(GaLore):
    """GaLore around torch's SGD with momentum.

    Decay is L2, on the gradient, as torch's SGD does it.

    Args:
        params: parameters or groups; those with a `rank` are projected (see `GaLore`).
        lr: learning rate.
        momentum: factor of the momentum.
        dampening: of the momentum.
        weight_decay: L2 decay.
        nesterov: Nesterov's momentum.
        maximize: go up instead of down.
        fused: torch's fused kernel.
        state_dtype: dtype of the momentum; the weight's own when None.
        rounding: of updates into weights of 16 bits: `nearest`, `stochastic` or `compensated` (see `GaLore`).
        skip_nonfinite: leave out weights whose gradient is not finite.
        seed: of the decompositions' random numbers.

    Raises:
        ValueError: an argument or a group that is not supported.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        rounding: Rounding = "nearest",
        skip_nonfinite: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            optimizer_class=torch.optim.SGD,
            state_dtype=state_dtype,
            rounding=rounding,
            skip_nonfinite=skip_nonfinite,
            seed=seed,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            fused=fused,
        )
