"""The settings of adapters: matrices of low rank that are trained in the place of whole ones, to compare with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from galore_torch.training.settings.fields import check, setting

ADAPTERS = ("none", "low-rank", "lora", "relora")

_CYCLES = 4
"""Parts that restarts cut a run into by default: the paper of ReLoRA restarts every 5,000 of 20,000 steps."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is trained in the place of the attention's and the MLPs' matrices."""

    adapter: str = setting(
        "none",
        "What is trained in the place of a matrix W: none (W itself), low-rank (W = B A), lora (W frozen, plus B A), "
        "or relora (lora that is merged into W and begun again).",
        choices=ADAPTERS,
    )
    adapter_rank: int | None = setting(None, "Rank of B A.", minimum=1, shown="rank")
    adapter_alpha: float = setting(32.0, "Factor on LoRA's B A, divided by the rank.", above=0)
    adapter_dropout: float = setting(
        0.05, "Share of a LoRA's inputs that is dropped while it trains.", minimum=0, below=1
    )
    restart_every: int | None = setting(
        None, "Steps after which a ReLoRA is merged and begun again.", minimum=1, shown="a quarter of the steps"
    )
    restart_warmup: float = setting(
        0.2,
        "Share of restart_every over which the learning rate rises again from 0 after a restart.",
        minimum=0,
        below=1,
    )
    restart_prune: float = setting(
        0.99,
        "Share of a ReLoRA's optimizer state that a restart sets to 0, the smallest numbers first; 1 begins it anew.",
        minimum=0,
        maximum=1,
    )

    def __post_init__(self) -> None:
        check(self)
        heeded = {"adapter"} | _HEEDED[self.adapter]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in heeded and value != field.default:
                others = [name for name in ADAPTERS if field.name in _HEEDED[name]]
                raise ValueError(
                    f"{field.name} = {value!r} is for adapter = {' or '.join(map(repr, others))}, "
                    f"not for {self.adapter!r}; leave it out."
                )


_LORA = {"adapter_rank", "adapter_alpha", "adapter_dropout"}
_HEEDED: dict[str, set[str]] = {
    "none": set(),
    "low-rank": {"adapter_rank"},
    "lora": _LORA,
    "relora": _LORA | {"restart_every", "restart_warmup", "restart_prune"},
}


def heeded_by(adapter: str, name: str) -> bool:
    """Whether a setting means anything with an adapter; settings of other sections do.

    >>> heeded_by("low-rank", "adapter_rank"), heeded_by("low-rank", "adapter_alpha"), heeded_by("none", "steps")
    (True, False, True)
    """
    mine = {field.name for field in dataclasses.fields(AdapterConfig)} - {"adapter"}
    return name not in mine or name in _HEEDED[adapter]


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
    decided: dict[str, int] = {}
    if config.adapter != "none" and config.adapter_rank is None:
        decided["adapter_rank"] = rank
    if config.adapter == "relora" and config.restart_every is None:
        decided["restart_every"] = max(1, steps // _CYCLES)
    return dataclasses.replace(config, **decided)  # type: ignore[arg-type]
