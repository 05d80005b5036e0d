"""The steps that are made to look at gradients, and the looks."""

# ruff: noqa: ARG002 - a callback takes whatever the Trainer hands to every callback

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from galore_torch.training.inspection.config import LookConfig
from galore_torch.training.inspection.watch import Watch
from galore_torch.training.run.signals import stop_if_asked


class Observer(TrainerCallback):
    """Looks at the gradients of some weights, after they are complete and clipped and before the optimizer moves.

    Args:
        weights: by name, which the model has.
        looks: when.
        rank: at which figures are told.

    Attributes:
        watches: one a weight.
    """

    def __init__(self, weights: Mapping[str, Tensor], looks: LookConfig, rank: int) -> None:
        self._weights = weights
        self._looks = looks
        self.watches = [Watch(name, tuple(one.shape), rank, len(looks.ages)) for name, one in weights.items()]

    @property
    def kept_bytes(self) -> int:
        """What the bases that are kept at the same time will take."""
        return sum(
            watch.ages * 4 * watch.side**2 * (weight.numel() // (weight.shape[-1] * weight.shape[-2]))
            for watch, weight in zip(self.watches, self._weights.values(), strict=True)
        )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Look, when it is time."""
        step = state.global_step + 1
        if step % self._looks.every == 0 and step <= self._looks.steps:
            for watch, weight in zip(self.watches, self._weights.values(), strict=True):
                watch.look(step, weight.grad)
                stop_if_asked()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End after the last look."""
        stop_if_asked()
        if state.global_step >= self._looks.looks * self._looks.every:
            control.should_training_stop = True


def require_steps(trainer: Trainer, looks: LookConfig) -> None:
    """Refuse a training that would end before the last look.

    Args:
        trainer: with its data.
        looks: when gradients are looked at.

    Raises:
        ValueError: when it would.
    """
    args = trainer.args
    available = args.max_steps
    if available <= 0:
        batches = len(trainer.get_train_dataloader())
        available = math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))
    if available < looks.steps:
        raise ValueError(
            f"steps = {looks.steps} is beyond the {available} steps that the run makes in all; give at most that."
        )
