"""The steps that an inspection makes, and the snapshots of gradients on the way."""

# ruff: noqa: ARG002 - a callback takes whatever the Trainer hands to every callback

from __future__ import annotations

import math
from typing import Any

from rich.markup import escape
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from galore_torch.training.inspection.config import InspectConfig
from galore_torch.training.inspection.history import GradientHistory
from galore_torch.training.inspection.jobs import InspectedJob
from galore_torch.training.run import optimizers
from galore_torch.training.run.job import Job, make_trainer
from galore_torch.training.run.signals import stop_if_asked
from galore_torch.training.settings.optimizer import modules_named
from galore_torch.units import readable


class GradientObserver(TrainerCallback):
    """Takes snapshots of gradients, after they are complete and clipped and before the optimizer moves.

    Args:
        inspected: the job whose Trainer it is added to.
        config: the inspection's settings; a ValueError says that they mean no weight.

    Attributes:
        rank: of the bases that figures are about.
        weights: those that are observed, by name.
        histories: of their gradients, one a weight.
        losses: of the steps.
        announcement: what is about to be done, and the memory that it takes besides the training's; in Rich's markup.
    """

    def __init__(self, inspected: InspectedJob, config: InspectConfig) -> None:
        self.inspected, self.config, snapshots = inspected, config, config.snapshots
        self.weights = _weights(inspected.job, snapshots.target_modules)
        self.rank = int(snapshots.rank or inspected.job.config.optimizer.rank)
        each, ages = self.weights.items(), len(snapshots.ages)
        self.histories = [GradientHistory(name, tuple(weight.shape), self.rank, ages) for name, weight in each]
        self.losses: list[float] = []
        kept = sum(4 * ages * one.side**2 * math.prod(one.shape[:-2]) for one in self.histories)
        self.announcement = (
            f"[bold]{escape(inspected.title)}[/]: {len(each)} weights, {snapshots.count} snapshots, one "
            f"every {snapshots.every} steps; their bases take {readable(kept)}"
        )

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take a snapshot of each weight's gradient, when it is time."""
        step = state.global_step + 1
        if step % self.config.snapshots.every == 0 and step <= self.config.snapshots.last:
            for history, weight in zip(self.histories, self.weights.values(), strict=True):
                history.add(step, weight.grad)
                stop_if_asked()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End after the last snapshot."""
        stop_if_asked()
        if state.global_step >= self.config.snapshots.last:
            control.should_training_stop = True

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the loss of a step."""
        self.losses += [value for name, value in (kwargs.get("logs") or {}).items() if name == "loss"]


def observed_trainer(observer: GradientObserver, folder: str, *callbacks: TrainerCallback) -> Trainer:
    """Make the Trainer of the observed job, with the observer and further callbacks in it.

    Args:
        observer: of the job; a ValueError says that the training would end before its last snapshot.
        folder: which the Trainer may write into.
        callbacks: further ones.
    """
    job, steps = observer.inspected.job, observer.config.snapshots.steps
    own: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no"}
    if not observer.inspected.is_fresh:
        own |= {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}, "warmup_steps": 0, "max_steps": steps}
    optimizer = optimizers.build(job.model, job.config.optimizer, job.config.schedule.seed, job.target_modules)
    trainer = make_trainer(job, folder, optimizer, callbacks=[observer, *callbacks], **own)
    args, available = trainer.args, trainer.args.max_steps
    if available <= 0:
        batches = len(trainer.get_train_dataloader())
        available = math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))
    if available < steps:
        raise ValueError(
            f"steps = {steps} is beyond the {available} steps that the run makes in all; give at most that."
        )
    return trainer


def _weights(job: Job, target_modules: str | None) -> dict[str, Tensor]:
    """The weights of some modules, or those that the job projects, by name."""
    targets = job.target_modules if target_modules is None else modules_named(target_modules)
    try:
        return optimizers.matrices(job.model, targets)
    except ValueError as error:
        field = "model" if target_modules is None else f"target_modules = {target_modules!r}"
        raise ValueError(f"{field}: {error}.") from error
