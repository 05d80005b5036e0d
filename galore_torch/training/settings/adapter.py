"""The settings of adapters: matrices of low rank that are trained in the place of whole ones, to compare with."""

from __future__ import annotations

import dataclasses
from typing import Literal

from galore_torch.training.settings.fields import require_defaults, setting, settings

Adapter = Literal["none", "low-rank", "lora", "relora"]

_CYCLES = 4
"""Parts that restarts cut a run into by default: the paper of ReLoRA restarts every 5,000 of 20,000 steps."""


@settings
class AdapterConfig:
    """What is trained in the place of the attention's and the MLPs' matrices."""

    adapter: Adapter = setting(
        "none",
        "What is trained in the place of a matrix W: none (W itself), low-rank (W = B A), lora (W frozen, plus B A), "
        "or relora (lora that is merged into W and begun again).",
    )
    adapter_rank: int | None = setting(None, "Rank of B A.", ge=1, default_help="rank")
    adapter_alpha: float = setting(32.0, "Factor on LoRA's B A, divided by the rank.", gt=0)
    adapter_dropout: float = setting(0.05, "Share of a LoRA's inputs that is dropped while it trains.", ge=0, lt=1)
    restart_every: int | None = setting(
        None, "Steps after which a ReLoRA is merged and begun again.", ge=1, default_help="a quarter of the steps"
    )
    restart_warmup: float = setting(
        0.2, "Share of restart_every over which the learning rate rises again from 0 after a restart.", ge=0, lt=1
    )
    restart_prune: float = setting(
        0.99,
        "Share of a ReLoRA's optimizer state that a restart sets to 0, the smallest numbers first; 1 begins it anew.",
        ge=0,
        le=1,
    )

    def __post_init__(self) -> None:
        require_defaults(self, "adapter", ADAPTERS_WITH)


ADAPTERS_WITH: dict[str, tuple[str, ...]] = {
    "adapter_rank": ("low-rank", "lora", "relora"),
    **dict.fromkeys(("adapter_alpha", "adapter_dropout"), ("lora", "relora")),
    **dict.fromkeys(("restart_every", "restart_warmup", "restart_prune"), ("relora",)),
}
"""What each setting has an effect with, if not with every adapter."""


def resolved(config: AdapterConfig, *, rank: int, steps: int) -> AdapterConfig:
    """The settings with what other settings decide by default filled in.

    Args:
        config: as given.
        rank: that of the projection, so that methods compare at equal rank.
        steps: of the whole run.

    Returns:
        Settings whose `adapter_rank` and, for ReLoRA, `restart_every` are known.

    >>> resolved(AdapterConfig(adapter="lora"), rank=64, steps=400).adapter_rank
    64
    """
    if config.adapter != "none" and config.adapter_rank is None:
        config = dataclasses.replace(config, adapter_rank=rank)
    if config.adapter == "relora" and config.restart_every is None:
        config = dataclasses.replace(config, restart_every=max(1, steps // _CYCLES))
    return config
