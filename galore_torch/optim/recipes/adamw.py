"""`GaLoreAdamW`: the paper's optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from galore_torch.lowbit import Rounding
from galore_torch.optim.arguments import listed
from galore_torch.optim.galore import GaLore
from galore_torch.optim.recipes.others import OthersBits, adamw_of_bits
from galore_torch.optim.rule import Traits, UpdateContext


class GaLoreAdamW(GaLore):
    """GaLore around torch's AdamW: the paper's optimizer.

    Decay is decoupled and acts on the weight before the update, as torch's AdamW does it.

    Args:
        params: parameters or groups; those with a `rank` are projected (see `GaLore`).
        lr: learning rate. The paper's: 0.01 with `scale` 0.25.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment; 1e-8 as in the paper (galore-torch 1.0 had 1e-6).
        weight_decay: decoupled decay of the weight.
        amsgrad: use the largest second moment so far.
        maximize: go up instead of down.
        fused: torch's fused kernel; where torch supports it when None.
        correct_bias: False leaves out the bias correction of the moments.
        no_deprecation_warning: understood for callers of galore-torch 1.0; there is no such warning.
        others_bits: 8 or 4, for moments in so many bits of what is not projected (embeddings, head, norms), held by
            torchao's AdamW; None: as AdamW keeps them.
        state_dtype: dtype of the moments; the weight's own when None.
        rounding: of updates into weights of 16 bits: `nearest`, `stochastic` or `compensated` (see `GaLore`).
        skip_nonfinite: leave out weights whose gradient is not finite.
        seed: of the decompositions' random numbers.

    Raises:
        ValueError: an argument or a group that is not supported.
        ImportError: `others_bits` without torchao.

    Example:
        >>> layer = torch.nn.Linear(64, 256)
        >>> groups = [{"params": [layer.weight], "rank": 8}, {"params": [layer.bias]}]
        >>> optimizer = GaLoreAdamW(groups, lr=0.01)
        >>> layer(torch.randn(2, 64)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[layer.weight]["inner"]["exp_avg"].shape
        torch.Size([256, 8])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        correct_bias: bool = True,
        no_deprecation_warning: bool = True,  # noqa: ARG002 (for old callers)
        others_bits: OthersBits | None = None,
        state_dtype: torch.dtype | None = None,
        rounding: Rounding = "nearest",
        skip_nonfinite: bool = False,
        seed: int = 0,
    ) -> None:
        params = listed(params)
        others_class = adamw_of_bits(others_bits)
        if others_class is not None and (amsgrad or not correct_bias):
            raise ValueError(
                f"{f'amsgrad={amsgrad!r}' if amsgrad else f'correct_bias={correct_bias!r}'} with "
                f"others_bits={others_bits!r}: torchao's {others_class.__name__}, which then moves what is not "
                "projected, does not serve it; leave out one of them"
            )
        super().__init__(
            params,
            optimizer_class=torch.optim.AdamW,
            fallback_class=others_class,
            traits=None if correct_bias else Traits(decay="decoupled", factor=_undo_bias_correction, is_another=True),
            state_dtype=state_dtype,
            rounding=rounding,
            skip_nonfinite=skip_nonfinite,
            seed=seed,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            fused=_can_fuse(params) if fused is None else fused,
        )


def _can_fuse(params: list[Any]) -> bool | None:
    """Whether torch's fused kernels take all of these parameters; None leaves the choice to torch."""
    entries = [one for entry in params for one in (entry["params"] if isinstance(entry, dict) else [entry])]
    tensors = [one[1] if isinstance(one, tuple) else one for one in entries]
    devices = _get_fused_kernels_supported_devices()
    fits = (isinstance(t, Tensor) and t.is_floating_point() and t.device.type in devices for t in tensors)
    return True if all(fits) else None


def _undo_bias_correction(moved: UpdateContext) -> float:
    beta1, beta2 = moved.group["betas"]
    return float((1 - beta1**moved.step) / (1 - beta2**moved.step) ** 0.5)
