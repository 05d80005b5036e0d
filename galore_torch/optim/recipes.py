"""The named recipes, and what is declared of optimizers that a probe cannot tell about.

This is the one file that knows optimizers by name. A recipe is a `GaLore` around one optimizer, with its arguments
spelled out, so that trainers which filter arguments by signature can call it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from galore_torch.optim.galore import GaLore
from galore_torch.optim.rule import DECLARED, Decay, Moved, Traits


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
        state_dtype: dtype of the moments; the weight's own when None.
        skip_nonfinite: leave out weights whose gradient is not finite.
        seed: of the decompositions' random numbers.

    Raises:
        ValueError: an argument or a group that cannot be served.

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
        state_dtype: torch.dtype | None = None,
        skip_nonfinite: bool = False,
        seed: int = 0,
    ) -> None:
        params = list(params)
        super().__init__(
            params,
            optimizer=torch.optim.AdamW,
            traits=None if correct_bias else Traits(decay="decoupled", factor=_undo_bias_correction),
            state_dtype=state_dtype,
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


class GaLoreAdamW8bit(GaLore):
    """GaLore around bitsandbytes' AdamW with 8-bit states.

    Coordinates of fewer than `min_8bit_size` elements keep 32-bit states.

    Args:
        params: parameters or groups; those with a `rank` are projected (see `GaLore`).
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of the weight, before the update.
        optim_bits: understood for callers of galore-torch 1.0: 8, or its default 32, which it read as 8.
        min_8bit_size: fewer elements than this stay in 32 bits.
        is_paged: let the states move to the host when device memory runs out.
        state_dtype: dtype of the coordinates (the states have 8 bits whatever it is); the weight's own when None.
        skip_nonfinite: leave out weights whose gradient is not finite.
        seed: of the decompositions' random numbers.

    Raises:
        ImportError: bitsandbytes is missing.
        ValueError: an argument or a group that cannot be served.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        optim_bits: int = 8,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        state_dtype: torch.dtype | None = None,
        skip_nonfinite: bool = False,
        seed: int = 0,
    ) -> None:
        if optim_bits not in (8, 32):
            raise ValueError(f"optim_bits is {optim_bits!r}; the states have 8 bits. Use GaLoreAdamW for more")
        try:
            import bitsandbytes
        except ImportError as error:
            raise ImportError('GaLoreAdamW8bit needs bitsandbytes: pip install "galore-torch[bnb]"') from error
        super().__init__(
            params,
            optimizer=getattr(bitsandbytes.optim, "PagedAdamW8bit" if is_paged else "AdamW8bit"),
            state_dtype=state_dtype,
            skip_nonfinite=skip_nonfinite,
            seed=seed,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            min_8bit_size=min_8bit_size,
        )


class GaLoreAdafactor(GaLore):
    """GaLore around Adafactor (Shazeer and Stern 2018), with the arguments that Transformers' class has.

    torch's Adafactor runs inside. What it would read from the parameter is served from the weight: the scale by its
    root mean square, the relative step, and decay.

    Args:
        params: parameters or groups; those with a `rank` are projected (see `GaLore`).
        lr: learning rate. None: the relative step, capped at 0.01.
        eps: added to the squared gradient; and the least root mean square of a weight.
        clip_threshold: updates of a larger root mean square are scaled down to it; at least 1.
        decay_rate: exponent of the second moment's decay, 1 - t^decay_rate.
        beta1: understood for callers of galore-torch 1.0; only None is served.
        weight_decay: decay of the weight, times the rate it moves with.
        scale_parameter: times the weight's root mean square. None: only if `lr` is None.
        relative_step: at most 1/sqrt(t). None: only if `lr` is None.
        warmup_init: the relative step starts at 1e-6 t.
        maximize: go up instead of down.
        state_dtype: dtype of the coordinates and the factored moment; the weight's own when None.
        skip_nonfinite: leave out weights whose gradient is not finite.
        seed: of the decompositions' random numbers.

    Raises:
        ValueError: arguments that exclude each other, or a group that cannot be served.
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
        if clip_threshold < 1:
            raise ValueError(f"clip_threshold is {clip_threshold!r}; use at least 1")
        super().__init__(
            params,
            optimizer=torch.optim.Adafactor,
            state_dtype=state_dtype,
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
        skip_nonfinite: leave out weights whose gradient is not finite.
        seed: of the decompositions' random numbers.

    Raises:
        ValueError: an argument or a group that cannot be served.
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
        skip_nonfinite: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            optimizer=torch.optim.SGD,
            state_dtype=state_dtype,
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


def _can_fuse(params: list[Any]) -> bool | None:
    """Whether torch's fused kernels take all of these parameters; None leaves the choice to torch."""
    tensors: list[Any] = []
    for entry in params:
        tensors.extend([entry["params"]] if isinstance(entry, dict) and isinstance(entry["params"], Tensor) else [])
        if isinstance(entry, dict) and not isinstance(entry["params"], Tensor):
            entry["params"] = list(entry["params"])
            tensors.extend(entry["params"])
        elif not isinstance(entry, dict):
            tensors.append(entry)
    tensors = [one[1] if isinstance(one, tuple) else one for one in tensors]
    devices = _get_fused_kernels_supported_devices()
    fits = (isinstance(t, Tensor) and t.is_floating_point() and t.device.type in devices for t in tensors)
    return True if all(fits) else None


def _undo_bias_correction(moved: Moved) -> float:
    beta1, beta2 = moved.group["betas"]
    return float((1 - beta1**moved.step) / (1 - beta2**moved.step) ** 0.5)


def _muon_shape_ratio(moved: Moved) -> float:
    """Muon's learning rate depends on the parameter's shape, and the coordinates' shape is not the weight's."""

    def adjusted(rows: int, columns: int) -> float:
        match moved.group.get("adjust_lr_fn"):
            case None | "original":
                return math.sqrt(max(1.0, rows / columns))
            case "match_rms_adamw":
                return math.sqrt(max(rows, columns))
        return 1.0

    return adjusted(*moved.weight.shape[:2]) / adjusted(*moved.coordinates_shape[:2])


# Adafactor's rate depends on the weight's root mean square and on the number of the step. The rule inside moves
# coordinates at a rate so small that no cap acts on it, and the weight's own rate replaces it.
_UNIT_RATE = 1e-4


def _adafactor_rate(moved: Moved) -> float | Tensor:
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


def _adafactor_factor(moved: Moved) -> float | Tensor:
    return _adafactor_rate(moved) / _UNIT_RATE


def _adafactor_decay_rate(moved: Moved) -> float | Tensor:
    """Transformers' class decays with the rate the weight moves with, torch's with the plain learning rate."""
    return _adafactor_rate(moved) if "relative_step" in moved.group else float(moved.group["lr"])


def _adafactor_given(group: Mapping[str, Any]) -> dict[str, Any]:
    return {"lr": _UNIT_RATE, "eps": (group["eps"][0], 1.0)}


DECLARED[f"{torch.optim.Adafactor.__module__}.Adafactor"] = Traits(
    decay="decoupled", learning_rate=_adafactor_decay_rate, factor=_adafactor_factor, given=_adafactor_given
)
DECLARED[f"{torch.optim.Muon.__module__}.Muon"] = Traits(decay="decoupled", factor=_muon_shape_ratio)
# torchao's compile a kernel when first tried, which takes seconds.
_TORCHAO: dict[str, Decay] = {"AdamW": "decoupled", "Adam": "l2"}
for _name, _decay in _TORCHAO.items():
    for _bits in ("8bit", "4bit", "Fp8"):
        DECLARED[f"torchao.optim.adam.{_name}{_bits}"] = Traits(decay=_decay)
