"""The settings of ``galore plan`` that a training has not: on which cards it would run, and for how long."""

from __future__ import annotations

from galore_torch.training.settings.fields import Parallel, require_defaults, setting, settings
from galore_torch.units import parse_bandwidth, parse_tokens

OF_A_STEP = ("seq", "vocab", "batch", "micro_batch", "gradient_checkpointing")
"""Settings of a pre-training's text and schedule that decide what a step needs."""

LIKE = "llama-60m"
"""The preset whose recipe a model gets that is none."""

RUN = "run"
"""What stands where methods do for a run's own."""


@settings
class Cards:
    """Where a training would run, one process a card."""

    world_size: int = setting(1, "Processes, one a card; says what each needs and sends.", ge=1)
    parallel: Parallel = setting("ddp", "What they share: ddp, the batch; fsdp, weights and states as well.")
    shard_bases: bool = setting(False, "With fsdp: bases are divided as well.")
    bandwidth: str | None = setting(None, "Of each card's link, such as 10gbit or 25GB/s.")
    tokens: str | None = setting(None, "Of the training, such as 20B; says the days.")
    tokens_per_second: float | None = setting(None, "Of one process alone, as a run measured it.", gt=0)

    def __post_init__(self) -> None:
        name = "parallel" if self.link is None else "bandwidth"
        if self.world_size == 1 and (name == "bandwidth" or self.parallel != "ddp"):
            raise ValueError(f"{name} has no effect with world_size = 1; give --world-size.")
        require_defaults(self, "parallel", {"shard_bases": ("fsdp",)})
        if self.whole is not None and self.tokens_per_second is None:
            raise ValueError(
                f"tokens = {self.tokens!r} takes a time that depends on the card; give --tokens-per-second, of one "
                "process, as a run prints it."
            )

    @property
    def link(self) -> float | None:
        """The bytes a second of each card's link; None if nobody said."""
        return None if self.bandwidth is None else parse_bandwidth(self.bandwidth)

    @property
    def whole(self) -> float | None:
        """The tokens of the whole training; None if nobody said."""
        return None if self.tokens is None else parse_tokens(self.tokens)
