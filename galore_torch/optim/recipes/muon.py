"""`GaLoreMuon`: one momentum in the subspace, and the whole gradient orthogonalized with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from galore_torch.group_keys import Moments, Normalize, Residual
from galore_torch.lowbit import Rounding
from galore_torch.optim.galore import GaLore
from galore_torch.optim.groups import is_projected
from galore_torch.optim.recipes.others import OthersBits, adamw_of_bits
from galore_torch.optim.recipes.unsaid import where_unsaid
from galore_torch.optim.rule import Traits


class GaLoreMuon(GaLore):
    """Muon with a momentum of low rank, at half of the moments that GaLore keeps around Adam.

    With R the projected gradient and P the basis, M <- momentum M + R is kept, and what is orthogonalized (as in Muon)
    is P (R + momentum M) + residual_scale (G - P R): the part in the subspace is averaged over steps as by Nesterov,
    the rest enters as it is. M is rotated into each new basis. Entries of an update have a root mean square of about
    `scale` times `lr`, whatever the shape; 0.2 is about what AdamW's have. What is not projected (embeddings, head,
    norms) is moved by AdamW.

    The residual needs full gradients, which `attach` and the factory then form by default. Where they are never formed
    (`gradients="fused"` or `"projected"`), give `residual=None`: the momentum alone is then orthogonalized,
    inside the subspace.

    After Muon (arXiv 2502.16982), SUMO (arXiv 2505.24749) and FRUGAL (arXiv 2411.07837).

    Args:
        params: parameters or groups; those with a `rank` are projected (see `GaLore`).
        lr: learning rate, of what is not projected too unless its group says another. 0.008 and 0.08 were best for a
            LLaMA of 4.2M parameters, 8 times and twice AdamW's.
        momentum: decay of the momentum.
        betas: decay rates of AdamW's two moments.
        eps: added to the root of AdamW's second moment.
        weight_decay: decoupled decay of the weight, before the update.
        scale: of the updates of projected weights, where a group does not say it, as all that follow here.
        residual: what becomes of the gradient's part outside the subspace.
        residual_scale: factor on it. None: 1 / (1 - momentum) for `full`, which then weighs as much as the sum of
            gradients that the momentum is, and 1 for the others.
        moments: what becomes of the momentum when a basis is renewed.
        normalize: what gives updates their size; `blocks` costs fewer operations than `orthogonal` and learns nearly as
            well (docs/study.md), `columns` costs fewest.
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
        >>> optimizer = GaLoreMuon([{"params": [layer.weight], "rank": 8}, {"params": [layer.bias]}], lr=0.01)
        >>> layer(torch.randn(2, 64)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[layer.weight]["inner"]["momentum_buffer"].shape
        torch.Size([256, 8])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        scale: float = 0.2,
        residual: Residual | None = "full",
        residual_scale: float | None = None,
        moments: Moments = "rotate",
        normalize: Normalize | None = "orthogonal",
        others_bits: OthersBits | None = None,
        state_dtype: torch.dtype | None = None,
        rounding: Rounding = "nearest",
        skip_nonfinite: bool = False,
        seed: int = 0,
    ) -> None:
        if not 0 < momentum < 1:
            raise ValueError(f"momentum is {momentum!r}; use a number between 0 and 1, such as 0.9")
        own_scale = 1 / (1 - momentum) if residual == "full" else 1.0
        self._where_unsaid = {
            "scale": scale,
            "residual": residual,
            "residual_scale": own_scale if residual_scale is None else residual_scale,
            "moments": moments,
            "normalize": normalize,
        }
        super().__init__(
            params,
            optimizer_class=torch.optim.SGD,
            fallback_class=adamw_of_bits(others_bits) or torch.optim.AdamW,
            traits=Traits(decay="decoupled"),
            state_dtype=state_dtype,
            rounding=rounding,
            skip_nonfinite=skip_nonfinite,
            seed=seed,
            lr=lr,
            momentum=momentum,
            nesterov=True,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as `GaLore` does, with this recipe's keys where it does not say them.

        Args:
            param_group: with `params` and any keys; one with a `rank` is projected.

        Raises:
            ValueError: a value that is not supported. The optimizer is unchanged then.
        """
        filled = where_unsaid(param_group, self._where_unsaid) if is_projected(param_group) else {}
        super().add_param_group({**param_group, **filled})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_where_unsaid": self._where_unsaid}
