"""``subspaces.jsonl``: the renewals of a run whose optimizer projects. One JSON object a line.

| field | |
| --- | --- |
| step | in which the basis was renewed, from 1 |
| weight | its name |
| renewals | how many bases it has had, this one included |
| gap | steps until it renews again; fewer after the first, to its turn among the staggered layers |
| overlap | how much of the subspace before is left: 1 all, 0 as in a random one; null of the first |
| captured | share of the energy of the gradient, at this renewal, that the basis before still held; null of the first |
"""

# ruff: noqa: ARG002 - a callback takes whatever the Trainer hands to every callback

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from galore_torch.integrations.callback import galore_in, renewals_of
from galore_torch.training.run import records


class SubspaceLog(TrainerCallback):
    """Writes a record for every renewal of a basis."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._recorded: dict[str, int] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take up the records where the checkpoint ends."""
        if state.is_world_process_zero and self.path.exists():
            records.keep_until(self.path, state.global_step)
        self._recorded = {record["weight"]: record["renewals"] for record in records.read(self.path)}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record what has been renewed in this step."""
        galore = galore_in(kwargs["optimizer"])
        # Counted on the host: a step without a renewal reads nothing back from the device.
        if galore is None or renewals_of(galore) == sum(self._recorded.values()):
            return
        for name, subspace in galore.subspaces().items():
            if subspace.renewals == self._recorded.get(name, 0):
                continue
            self._recorded[name] = subspace.renewals
            if state.is_world_process_zero:
                record = {"step": state.global_step, "weight": name, **dataclasses.asdict(subspace)}
                records.append(self.path, record)


def summary(optimizer: Any) -> tuple[int, float | None]:
    """What the renewals of a run came to.

    Args:
        optimizer: any, or Accelerate's wrapper around it.

    Returns:
        How many bases were found for all weights together, the first ones included, and the mean over the weights of
        how much of the last basis but one is left in the last; None if there is no such.
    """
    galore = galore_in(optimizer)
    if galore is None:
        return 0, None
    known = [one.overlap for one in galore.subspaces().values() if not math.isnan(one.overlap)]
    return renewals_of(galore), sum(known) / len(known) if known else None
