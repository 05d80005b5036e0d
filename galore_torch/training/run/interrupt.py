"""Ctrl-C (and a cluster's SIGTERM) as a request: finish the step, save a resumable checkpoint, stop."""

# ruff: noqa: ARG002 - a callback takes whatever the Trainer hands to every callback

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from galore_torch.training.run.signals import SIGNALS
from galore_torch.training.run.stopping import heard, stop_if_asked


class SaveOnInterrupt(TrainerCallback):
    """Turns the first signal into a save and a stop at the end of the step; a second one acts as it always does."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Listen for signals; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
            stop_if_asked()

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self.asked = True
        heard(number)
        self.stop_listening()

    def stop_listening(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop once asked to."""
        if self.asked:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop listening."""
        self.stop_listening()
