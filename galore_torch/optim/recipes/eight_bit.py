"""`GaLoreAdamW8bit` and `QGaLoreAdamW8bit`: states in 8 bits, held by bitsandbytes, and bases in few bits."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from galore_torch.extras import install
from galore_torch.lowbit import Rounding
from galore_torch.optim.galore import GaLore
from galore_torch.optim.groups import is_projected
from galore_torch.optim.moments import MOMENTS_OF, Moment
from galore_torch.optim.recipes.unsaid import where_unsaid
from galore_torch.optim.rule import Traits

_BLOCK = 256
"""Numbers of a moment that share a scale."""

_SLICE_ELEMENTS = 2**20
"""On a CPU bitsandbytes copies what it moves, and its moments, into float32. A multiple of the block."""


def _decoded(state: Mapping[str, Any], name: str) -> Tensor:
    """A moment of bitsandbytes', which is in codes where it is of bytes."""
    moment: Tensor = state[name]
    if moment.dtype is not torch.uint8:
        return moment
    from bitsandbytes.functional import dequantize_blockwise

    absmax, code = state[f"absmax{name[-1]}"], state[f"qmap{name[-1]}"]
    return dequantize_blockwise(moment, absmax=absmax, code=code, blocksize=_BLOCK)


def _encode(state: Mapping[str, Any], name: str, moment: Tensor) -> None:
    if state[name].dtype is not torch.uint8:
        state[name].copy_(moment)
        return
    from bitsandbytes.functional import quantize_blockwise

    codes, found = quantize_blockwise(moment.contiguous(), code=state[f"qmap{name[-1]}"], blocksize=_BLOCK)
    state[name].copy_(codes)
    state[f"absmax{name[-1]}"].copy_(found.absmax)


_ADAM = {
    "state1": Moment(1, read=_decoded, write=_encode),
    "state2": Moment(2, mean="state1", read=_decoded, write=_encode),
    **dict.fromkeys(("qmap1", "qmap2", "absmax1", "absmax2"), Moment(0)),
}
for _kind in ("Adam", "AdamW"):
    for _form in (_kind, f"{_kind}8bit", f"{_kind}32bit"):
        for _name in (_form, f"Paged{_form}"):
            MOMENTS_OF[f"bitsandbytes.optim.{_kind.lower()}.{_name}"] = _ADAM


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
        rounding: of updates into weights of 16 bits: `nearest`, `stochastic` or `compensated` (see `GaLore`).
        skip_nonfinite: leave out weights whose gradient is not finite.
        seed: of the decompositions' random numbers.

    Raises:
        ImportError: bitsandbytes is missing.
        ValueError: an argument or a group that is not supported.
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
        rounding: Rounding = "nearest",
        skip_nonfinite: bool = False,
        seed: int = 0,
    ) -> None:
        if optim_bits not in (8, 32):
            raise ValueError(f"optim_bits is {optim_bits!r}; the states have 8 bits. Use GaLoreAdamW for more")
        try:
            import bitsandbytes
        except ImportError as error:
            raise ImportError(f"GaLoreAdamW8bit needs bitsandbytes. {install('bnb')}") from error
        super().__init__(
            params,
            traits=Traits(
                decay="decoupled",
                slice_elements=_SLICE_ELEMENTS,
                holds_in_few_bits=functools.partial(operator.le, min_8bit_size),
                block=_BLOCK,
                common=frozenset({"qmap1", "qmap2"}),
            ),
            optimizer_class=getattr(bitsandbytes.optim, "PagedAdamW8bit" if is_paged else "AdamW8bit"),
            state_dtype=state_dtype,
            rounding=rounding,
            skip_nonfinite=skip_nonfinite,
            seed=seed,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            min_8bit_size=min_8bit_size,
        )


class QGaLoreAdamW8bit(GaLoreAdamW8bit):
    """Q-GaLore (arXiv 2407.08296): states in 8 bits, bases in 4, and layers that renew lazily.

    For weights in 8 bits, too, call `quantize_weights` on the model before the groups are made. Groups may have the
    keys of Q-GaLore's own class: `quant` (False: bases in the weight's dtype), `quant_n_bit`, `quant_group_size`.

    Args:
        params: parameters or groups; those with a `rank` are projected (see `GaLore`).
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of the weight, before the update.
        basis_bits: bits of the bases' numbers, 4 or 8, where a group does not say it.
        cos_threshold: overlap of successive subspaces from which on a layer's gap grows, where a group does not say
            it; None renews at the fixed gap. It compares whole subspaces, not first vectors.
        optim_bits: understood for callers of other versions: 8, or 32, which is read as 8.
        min_8bit_size: fewer elements than this stay in 32 bits.
        is_paged: let the states move to the host when device memory runs out.
        state_dtype: dtype of the coordinates; the weight's own when None.
        rounding: of updates into weights of 16 bits: `nearest`, `stochastic` or `compensated` (see `GaLore`).
        skip_nonfinite: leave out weights whose gradient is not finite.
        seed: of the decompositions' random numbers.

    Raises:
        ImportError: bitsandbytes is missing.
        ValueError: an argument or a group that is not supported.
    """

    _further_keys: ClassVar[frozenset[str]] = frozenset({"quant", "quant_n_bit", "quant_group_size"})

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        basis_bits: int = 4,
        cos_threshold: float | None = 0.4,
        optim_bits: int = 8,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        state_dtype: torch.dtype | None = None,
        rounding: Rounding = "nearest",
        skip_nonfinite: bool = False,
        seed: int = 0,
    ) -> None:
        self._where_unsaid = {"basis_bits": basis_bits, "cos_threshold": cos_threshold}
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            optim_bits=optim_bits,
            min_8bit_size=min_8bit_size,
            is_paged=is_paged,
            state_dtype=state_dtype,
            rounding=rounding,
            skip_nonfinite=skip_nonfinite,
            seed=seed,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as `GaLore` does, with its keys in Q-GaLore's words or in ours.

        Args:
            param_group: with `params` and any keys; one with a `rank` is projected.

        Raises:
            ValueError: a value that is not supported. The optimizer is unchanged then.
        """
        translated = self._translated(param_group) if is_projected(param_group) else {}
        super().add_param_group({**param_group, **translated})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_where_unsaid": self._where_unsaid}

    def _translated(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of a projected group that it does not say, or says in Q-GaLore's words."""
        values = where_unsaid(group, self._where_unsaid)
        if "quant" in group and not group["quant"]:
            values["basis_bits"] = 16
        elif "quant_n_bit" in group:
            values["basis_bits"] = group["quant_n_bit"]
        if "quant_group_size" in group:
            values["basis_group_size"] = group["quant_group_size"]
        return values
