"""What is inspected: the very job of a run, from its newest weights or its first ones, or the training of a model.

Gradients are formed whole and applied at the step, on weights in their own dtype, whatever the job's settings say.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from galore_torch.training.finetune.run import Finetuning
from galore_torch.training.inspection.config import FULL_GRADIENTS, InspectConfig, SnapshotConfig, recipe_of
from galore_torch.training.pretrain.config import PretrainConfig
from galore_torch.training.pretrain.run import Pretraining
from galore_torch.training.run import records
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.job import Job
from galore_torch.training.settings.optimizer import KINDS

_LEAST_RATE = 0.1  # of the peak: where a schedule has ended at 0, gradients would differ by their batches alone
_PLAIN_NUMBERS: dict[str, Any] = {"grad_bits": 16, "weight_bits": 16, "weight_rounding": "stochastic"}


@dataclass(frozen=True, kw_only=True)
class InspectedJob:
    """A job that is about to train, on a copy of its model. Nothing of a run folder is changed by it."""

    job: Job  # with its data and its model
    title: str  # what it is, in words
    origin: dict[str, Any]  # where its weights come from, by name, for the page
    is_fresh: bool = False  # whether it makes the first steps of a run, by the run's own schedule
    remarks: list[str] = field(default_factory=list)  # what the reader must know, a sentence each
    renewals: list[records.Record] = field(default_factory=list)  # what a run recorded of its own

    @property
    def facts(self) -> dict[str, str]:
        """Where its weights come from, and its settings."""
        config = self.job.config
        length = config.data.seq if isinstance(config, PretrainConfig) else config.data.max_length
        facts = {
            **self.origin,
            "data": self.job.data,
            "optimizer": config.optimizer.optim,
            "learning rate": f"{'peak' if self.is_fresh else 'constant'} {config.optimizer.lr:g}",
            f"{self.job.unit} a step": self.job.units_per_step,
            "tokens of a sequence, at most": length,
        }
        return {name: str(value) for name, value in facts.items()}


def job_of_run(run: Path, snapshots: SnapshotConfig, console: Console, *, fresh: bool = False) -> InspectedJob:
    """Load a run's own job: its newest weights at a constant learning rate, or its first ones by its schedule.

    Args:
        run: the run folder; a ValueError says why it cannot be read or inspected.
        snapshots: the learning rate of the steps.
        console: where progress is shown.
        fresh: whether its first weights are meant.
    """
    folder = RunFolder(run)
    kind: type[Pretraining | Finetuning] = Finetuning if "task" in folder.settings() else Pretraining
    recorded: Any = kind.recorded(folder)
    if recorded.adapter.adapter != "none":
        raise ValueError(
            f"run = {str(run)!r} trained adapter = {recorded.adapter.adapter!r}, and an adapter's gradients have its "
            f"rank already; inspect what it merged into by --model {folder.model} --data ..."
        )
    weights, step = (None, 0) if fresh else folder.newest_weights()
    own, schedule, lr = recorded.optimizer, recorded.schedule, snapshots.lr
    if weights is not None:
        schedule = dataclasses.replace(schedule, seed=schedule.seed + 1)  # from its end, on an order of its own
        rates = [one["lr"] for one in records.read(folder.metrics) if "lr" in one and one["step"] <= step]
        lr = lr or max(_LEAST_RATE * own.lr, rates[-1] if rates else own.lr)
    lr = lr or own.lr
    others = None if own.others_lr is None else own.others_lr * lr / own.lr
    optimizer = dataclasses.replace(own, lr=lr, others_lr=others, **FULL_GRADIENTS, **_PLAIN_NUMBERS)
    config = dataclasses.replace(recorded, optimizer=optimizer, schedule=schedule)
    job = kind(config if weights is None else config.going_on_from(weights), console)
    remarks = {
        f"The run had gradients = {own.gradients!r}, which round otherwise.": fresh and own.gradients != "full",
        "The data have changed since the run was started; gradients are of the data as they are now.": (
            folder.digest_of() != job.digest
        ),
        "The run kept INT8 weights; they are inspected as they were saved, in its own dtype.": own.weight_bits != 16,
        f"The run projects by proj_type = {own.proj_type!r}; bases here are those of std, on the shorter side.": (
            KINDS[own.optim].projected and own.proj_type != "std"
        ),
    }
    return InspectedJob(
        job=job,
        title=f"{recorded.title} in {run}, {'its first steps' if weights is None else f'after its step {step:,}'}",
        origin={"run": run, "weights": weights or "fresh", "rank and gap": f"{own.rank}, {own.update_proj_gap}"},
        is_fresh=fresh,
        remarks=[remark for remark, applies in remarks.items() if applies],
        renewals=records.read(folder.subspaces),
    )


def job_of_model(model: str, data: str | None, config: InspectConfig, console: Console) -> InspectedJob:
    """Load a model with data: as `galore finetune` would train it, or on packed text as `galore pretrain` does.

    Args:
        model: name or folder; a ValueError says why it cannot be loaded or does not fit the data.
        data: file or folder; None for a task that brings its own.
        config: the inspection's settings.
        console: where progress is shown.
    """
    recipe = recipe_of(model, data, config)
    job = Pretraining(recipe, console) if isinstance(recipe, PretrainConfig) else Finetuning(recipe, console)
    return InspectedJob(job=job, title=f"{model} on {data or config.data.task}", origin={"model": model})
