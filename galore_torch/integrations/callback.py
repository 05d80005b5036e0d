"""GaLore's own figures, live, beside the loss: in whatever Trainer's ``report_to`` names.

    trainer = Trainer(...)
    trainer.add_callback(GaLoreCallback(trainer))

Trainer puts the trackers before every callback of its user, so that what a callback adds to a record comes too late for
them. Hence the trainer is asked to log the figures itself, after each of its own records, whatever its logging strategy.

| figure | |
| --- | --- |
| galore/overlap, galore/overlap_min | how much of each weight's last basis but one is left in the last: 1 all, 0 as of random ones; mean and least |
| galore/captured, galore/captured_min | share of the gradient's energy at the last renewal that the outgoing basis still held; mean and least |
| galore/renewals | bases found since the record before |
| galore/renewal_seconds | what they took, in seconds on the host |
| galore/state_bytes | the optimizer's state |

Overlap and captured energy are there once a weight has had two bases. They are read back from the device when a record
is due and something was renewed since the last, never between.
"""  # noqa: E501 - a table's rows are lines

# ruff: noqa: ARG002 - a callback takes whatever the Trainer hands to every callback

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from galore_torch.optim import GaLore, state_bytes

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as missing:
    raise ImportError(
        "GaLoreCallback needs transformers, which this environment does not have. "
        "Install it with:  pip install transformers"
    ) from missing

_OWN = "loss"
"""What every record of a training step has; those of evaluations, of the end and ours have not."""


class GaLoreCallback(TrainerCallback):
    """Logs how the subspaces fare, through the trainer and so to all that it reports to.

    Without a GaLore optimizer it logs nothing.

    Args:
        trainer: which the callback is then added to.

    Example:
        trainer.add_callback(GaLoreCallback(trainer))
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._renewals = 0
        self._seconds = 0.0
        self._fared: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count from here, also after a checkpoint has been loaded."""
        galore = galore_in(kwargs.get("optimizer"))
        if galore is not None:
            self._renewals, self._seconds = renewals_of(galore), galore.renewal_seconds
            self._fared = _fared(galore)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log our figures after the trainer's own."""
        galore = galore_in(kwargs.get("optimizer"))
        if galore is None or not logs or _OWN not in logs:
            return
        renewals, seconds = renewals_of(galore), galore.renewal_seconds
        if renewals != self._renewals:
            self._fared = _fared(galore)
        figures = {
            **self._fared,
            "galore/renewals": renewals - self._renewals,
            "galore/renewal_seconds": seconds - self._seconds,
            "galore/state_bytes": state_bytes(galore),
        }
        self._renewals, self._seconds = renewals, seconds
        self._trainer.log(figures)


def galore_in(optimizer: Any) -> GaLore | None:
    """The GaLore optimizer behind what a trainer hands on.

    Args:
        optimizer: any, or wrappers around it that keep it as ``optimizer``, as Accelerate's does.

    Returns:
        The optimizer, or None if it is another.
    """
    while optimizer is not None and not isinstance(optimizer, GaLore):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def renewals_of(galore: GaLore) -> int:
    """How many bases an optimizer has found, for all weights together, without asking the device.

    Args:
        galore: the optimizer.

    Returns:
        The number, the first ones and those before a checkpoint included.
    """
    return sum(state.get("renewals", 0) for state in galore.state.values())


def _fared(galore: GaLore) -> dict[str, float]:
    """How the subspaces fared at their last renewals."""
    told = galore.subspaces().values()
    return {
        **_mean_and_least("galore/overlap", [one.overlap for one in told]),
        **_mean_and_least("galore/captured", [one.captured for one in told]),
    }


def _mean_and_least(name: str, values: Sequence[float]) -> dict[str, float]:
    known = [value for value in values if not math.isnan(value)]
    return {name: sum(known) / len(known), f"{name}_min": min(known)} if known else {}
