"""What is measured while a run trains: every step and every evaluation."""

# ruff: noqa: ARG002 - a callback takes whatever the Trainer hands to every callback

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from galore_torch.training.run import records
from galore_torch.training.run.records import Record


def _perplexity(metrics: Record) -> Record:
    return {"perplexity": records.perplexity(metrics["eval_loss"])}


class MetricsLog(TrainerCallback):
    """Writes a record for every step and every evaluation, and keeps the newest for the display.

    Attributes:
        tokens_per_step: tokens, or whatever `unit` counts, that one step sees.
        unit: what is counted: tokens or examples.
        scores: what the newest evaluation came to, beside its loss.
        seconds: time spent in training steps so far.
        last: the newest record of a step.
        evaluation: the newest record of an evaluation.
    """

    def __init__(
        self,
        path: Path,
        tokens_per_step: int,
        *,
        unit: str = "tokens",
        scores: Callable[[Record], Record] = _perplexity,
    ) -> None:
        self.path = path
        self.tokens_per_step = tokens_per_step
        self.unit = unit
        self.scores: Record = {}
        self._scores_of = scores
        self.last: Record = {}
        self.evaluation: Record = {}
        self.seconds = 0.0
        self._since = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take up the clock where the records end."""
        kept = records.read(self.path)
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        self.evaluation = next((record for record in reversed(kept) if "eval_loss" in record), {})
        told = {"step", self.unit, "eval_loss", "seconds"}
        self.scores = {name: value for name, value in self.evaluation.items() if name not in told}
        self._since = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Record a step."""
        if not logs or "loss" not in logs:
            return
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self.seconds += seconds
        self.last = {
            "step": state.global_step,
            # Of a run whose length is told in epochs, so that a reader knows how far it is.
            **({"epoch": state.epoch} if args.max_steps <= 0 else {}),
            self.unit: state.global_step * self.tokens_per_step,
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            f"{self.unit}_per_second": self.tokens_per_step / seconds,
            "seconds": self.seconds,
        }
        self._append(state, self.last)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Record an evaluation."""
        measured = metrics or {}
        self.scores = self._scores_of(measured)
        self.evaluation = {
            "step": state.global_step,
            self.unit: state.global_step * self.tokens_per_step,
            "eval_loss": measured["eval_loss"],
            **self.scores,
            "seconds": self.seconds,
        }
        self._append(state, self.evaluation)
        self._since = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the time of the save out of the clock."""
        self._since = time.perf_counter()

    def _append(self, state: TrainerState, record: Record) -> None:
        if state.is_world_process_zero:
            records.append(self.path, record)
