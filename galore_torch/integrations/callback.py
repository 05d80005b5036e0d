"""Records the subspaces of a GaLore optimizer while Trainer trains: beside the loss, in whatever ``report_to`` names.

    trainer = Trainer(...)
    trainer.add_callback(GaLoreCallback(trainer))

Each renewal can also be handed to a function of one's own, see `GaLoreCallback`.

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
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from galore_torch.optim import GaLore, state_bytes
from galore_torch.optim.state_keys import RENEWALS
from galore_torch.optim.subspaces import Subspace

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
    """Records how the subspaces change. Without a GaLore optimizer it records nothing.

    Args:
        trainer: logs the figures, and so reports them to all its trackers; None logs none. The callback is then added
            to it.
        on_renewal: called in the first process for each weight at the end of a step that renewed its basis, with the
            step (from 1), the weight's name and its `galore_torch.optim.subspaces.Subspace`. The figures are then read
            back from the device at the end of each such step.

    Example:
        trainer.add_callback(GaLoreCallback(trainer))
    """

    def __init__(
        self, trainer: Trainer | None = None, *, on_renewal: Callable[[int, str, Subspace], None] | None = None
    ) -> None:
        self._trainer = trainer
        self._on_renewal = on_renewal
        self._subspaces: dict[str, Subspace] = {}  # as last read back
        self._logged = (0, 0.0)  # bases found and seconds taken, up to the last record

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count from here, also after a checkpoint has been loaded."""
        galore = galore_in(kwargs.get("optimizer"))
        if galore is not None:
            self._logged = renewals_of(galore), galore._outcomes.seconds
            self._subspaces = galore.subspaces()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hand on what this step renewed."""
        galore = galore_in(kwargs.get("optimizer"))
        if galore is None or self._on_renewal is None or not state.is_world_process_zero:
            return
        for name, subspace in self._renewed(galore).items():
            self._on_renewal(state.global_step, name, subspace)

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
        if galore is None or self._trainer is None or not logs or _OWN not in logs:
            return
        self._renewed(galore)
        renewals, seconds = self._logged
        self._logged = renewals_of(galore), galore._outcomes.seconds
        self._trainer.log(
            {
                **figures_of(self._subspaces.values()),
                "galore/renewals": self._logged[0] - renewals,
                "galore/renewal_seconds": self._logged[1] - seconds,
                "galore/state_bytes": state_bytes(galore),
            }
        )

    def _renewed(self, galore: GaLore) -> dict[str, Subspace]:
        """What was renewed since the last call. Counted on the host: without a renewal nothing is read back."""
        counts = {name: one.renewals for name, one in self._subspaces.items()}
        if renewals_of(galore) == sum(counts.values()):
            return {}
        self._subspaces = galore.subspaces()
        return {name: one for name, one in self._subspaces.items() if one.renewals != counts.get(name, 0)}


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
    return sum(state.get(RENEWALS, 0) for state in galore.state.values())


def figures_of(subspaces: Iterable[Subspace]) -> dict[str, float]:
    """Mean and least overlap and captured energy at the last renewals.

    Args:
        subspaces: of the projected weights, as ``GaLore.subspaces`` has them.

    Returns:
        ``galore/overlap``, ``galore/overlap_min``, ``galore/captured`` and ``galore/captured_min``, over the weights
        that have had two bases; nothing while none has.
    """
    found = list(subspaces)
    return {
        **_mean_and_least("galore/overlap", [one.overlap for one in found]),
        **_mean_and_least("galore/captured", [one.captured for one in found]),
    }


def _mean_and_least(name: str, values: Sequence[float]) -> dict[str, float]:
    known = [value for value in values if not math.isnan(value)]
    return {name: sum(known) / len(known), f"{name}_min": min(known)} if known else {}
