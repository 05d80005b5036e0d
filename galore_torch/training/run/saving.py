"""What the Trainer saves becomes whole checkpoints."""

# ruff: noqa: ARG002 - a callback takes whatever the Trainer hands to every callback

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from galore_torch.training.run import records
from galore_torch.training.run.checkpoints import Checkpoints
from galore_torch.training.run.files import sync


class CompleteCheckpoints(TrainerCallback):
    """Makes whole checkpoints of what the Trainer saves.

    Args:
        checkpoints: where they are kept.
        files: records that a resumed run goes on with: as far as its checkpoint, and after a loss of power no less.
    """

    def __init__(self, checkpoints: Checkpoints, files: Sequence[Path]) -> None:
        self.checkpoints = checkpoints
        self._files = files
        self._last: Path | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep the checkpoint that is gone on from, and of the records what it knows: before others read them."""
        for path in self._files:
            if state.is_world_process_zero and path.exists():
                records.keep_until(path, state.global_step)
        self._last = self.checkpoints.root / f"checkpoint-{state.global_step}" if state.global_step else None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Complete it."""
        for path in self._files:
            if path.exists():
                sync(path)
        self._last = self.checkpoints.complete(state.global_step, before=self._last)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave nothing but checkpoints."""
        self.checkpoints.clear()
