"""What the Trainer saves becomes whole checkpoints."""

# ruff: noqa: ARG002 - a callback takes whatever the Trainer hands to every callback

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from galore_torch.training.run.checkpoints import Checkpoints
from galore_torch.training.run.files import sync


class CompleteCheckpoints(TrainerCallback):
    """Makes whole checkpoints of what the Trainer saves.

    Args:
        checkpoints: where they are kept.
        records: files that a resumed run reads too, which must not be behind a checkpoint after a loss of power.
    """

    def __init__(self, checkpoints: Checkpoints, records: Sequence[Path]) -> None:
        self.checkpoints = checkpoints
        self.records = records
        self._last: Path | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep the checkpoint that is gone on from."""
        self._last = self.checkpoints.root / f"checkpoint-{state.global_step}" if state.global_step else None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Complete it."""
        for path in self.records:
            if path.exists():
                sync(path)
        self._last = self.checkpoints.complete(state.global_step, before=self._last)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave nothing but checkpoints."""
        self.checkpoints.clear()
