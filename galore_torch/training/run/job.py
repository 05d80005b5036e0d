"""What a run is of: a job brings data, model and schedule; `galore_torch.training.run.run` does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments

from galore_torch.training.run import optimizers, processes, sharded
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.stream import Stream
from galore_torch.training.settings.config import from_values
from galore_torch.values import largest_divisor


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to. One that was stopped has None for what needs an evaluation."""

    out: str  # the run folder
    optimizer: str
    adapter: str  # or "none"
    finished: bool
    step: int  # optimizer steps made, over all resumptions
    best_step: int | None  # the one whose weights the model has, if it has those of the best evaluation
    eval_loss: float | None  # on what is held out, at the end; nats per token of a language model
    state_bytes: int  # of the optimizer
    peak_memory_bytes: int  # of the GPU if there is one, of the process otherwise
    planned_memory_bytes: int | None  # the same, as it was planned before the first step; None if it was not
    parameters: int  # of the model, as it is saved
    trained_parameters: int  # those that the optimizer moves, of the model or of its adapters
    seconds: float  # time spent in training steps
    renewals: int  # bases found, over all weights and resumptions; 0 for an optimizer that does not project
    overlap: float | None  # of each weight's last two subspaces, on average: 1 for the same, 0 as of random ones
    checkpoint: str | None  # from which a stopped run is resumed

    @property
    def headline(self) -> str:
        """The scores and the pace, for people."""
        raise NotImplementedError

    @property
    def remarks(self) -> list[str]:
        """What people must know of the scores, a sentence each."""
        best = self.best_step
        return [] if best is None else [f"The model is that of step {best:,} of {self.step:,}, which scored best."]


class Job(ABC):
    """A pre-training, a fine-tuning or an inspection, with its data and its model loaded."""

    unit: ClassVar[str]  # what its records count: tokens or examples
    settings: ClassVar[type]  # the dataclass of its settings
    result: ClassVar[Callable[..., Any]]  # the subclass of `RunResult` that says what it came to
    task_type: str | None = None  # PEFT's name of what the model is trained for; None for newly initialized weights

    config: Any  # its settings: ``optimizer``, ``adapter``, ``schedule`` and ``title``
    model: PreTrainedModel  # without adapters, on the CPU
    tokenizer: PreTrainedTokenizerBase
    target_modules: str | Sequence[str]  # which modules hold the matrices, by the rules of `galore_torch.param_groups`
    data: str  # the name of what it is trained on
    digest: str  # changes with any token or row of that, but for those of a stream
    stream: Stream | None = None  # of which the tokens are known once they are read
    units_per_step: int  # tokens or examples
    patience: int | None = None  # evaluations, none better than the best, after which the training has ended
    announcement: str  # what is about to be trained, in Rich's markup

    @abstractmethod
    def __init__(self, config: Any, console: Console) -> None:
        """Load data and model, seeded; raise a ValueError when they cannot be read or do not fit the settings."""

    @classmethod
    def recorded(cls, folder: RunFolder) -> Any:
        """The settings of a run, with what resumptions have changed; a ValueError when they are not as written."""
        return from_values(cls.settings, folder.settings(cls.settings))

    @abstractmethod
    def schedule(self) -> dict[str, Any]:
        """Length, learning rate's schedule, evaluations and saves, by the names of `TrainingArguments`."""

    @abstractmethod
    def trainer(self, args: TrainingArguments, **more: Any) -> Trainer:
        """The Trainer with the data in it; ``more`` are further arguments of its constructor."""

    @abstractmethod
    def scores(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """What the Trainer's metrics of an evaluation say of the model besides the loss."""

    def figures(self, scores: dict[str, Any]) -> dict[str, Any]:
        """The fields that `result` has of the last scores; of none, where the run was stopped."""
        return {"scores": scores}

    def predictions(self, trainer: Trainer) -> list[dict[str, Any]]:  # noqa: ARG002
        """What the finished model says of what is held out: the lines of ``predictions.jsonl``, if there are any."""
        return []


def make_trainer(
    job: Job, folder: str, optimizer: torch.optim.Optimizer, callbacks: Sequence[Any] = (), **given: Any
) -> Trainer:
    """Make the Trainer of a job: whatever it is of, everything here is the same.

    Args:
        job: what is trained.
        folder: which the Trainer may write into.
        optimizer: over the model's parameters, see `galore_torch.training.run.optimizers.build`.
        callbacks: for the Trainer.
        given: `TrainingArguments` that take the place of the job's.
    """
    settings, schedule = job.config.optimizer, job.config.schedule
    micro_batch = processes.require_served(job.config)
    arguments: dict[str, Any] = {
        "learning_rate": settings.lr,
        "max_grad_norm": settings.max_grad_norm,
        "per_device_train_batch_size": micro_batch,
        "per_device_eval_batch_size": micro_batch,
        "gradient_accumulation_steps": schedule.batch // (micro_batch * processes.count()),
        "logging_steps": 1,  # a loss averaged over steps on both sides of an interruption would not be the same
        "logging_nan_inf_filter": False,
        # By steps also where an epoch is meant: the Trainer evaluates at an epoch's end after it has saved that step's
        # state, and an evaluation draws a random number, so that a run resumed from there would be another.
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "seed": schedule.seed,
        "data_seed": schedule.seed,
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,  # weights have the dtype that the settings say, and SFTConfig would have it otherwise
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    processes.connect()
    arguments |= job.schedule()
    if processes.count() > 1 and not torch.cuda.is_available():  # Accelerate would leave each process to itself
        arguments |= {"use_cpu": True, "ddp_backend": "gloo"}
    args = TrainingArguments(output_dir=folder, **(arguments | given))
    together = args.distributed_state is not None and args.distributed_state.use_distributed
    if args.world_size != processes.count() or together != (processes.count() > 1):
        raise ValueError(
            f"WORLD_SIZE = {processes.count()}, and Accelerate finds {args.world_size} processes; start the run by "
            "torchrun, on a machine whose devices all processes can use."
        )
    if args.n_gpu > 1:
        args._n_gpu = 1  # DataParallel would multiply the batch
    factory: Any = (optimizers.TrainerOptimizer, {"optimizer": optimizer, "config": settings})
    trainer = sharded.adopt(job.trainer(args, callbacks=list(callbacks)))
    trainer.optimizer_cls_and_kwargs = factory  # not all of TRL's trainers take it
    if processes.count() > 1:  # whole batches alone, so that none is filled up with rows that count twice
        rows = len(trainer.eval_dataset)  # type: ignore[arg-type]
        args.per_device_eval_batch_size = largest_divisor(rows, micro_batch)
    trainer.remove_callback(PrinterCallback)  # our own lines are shown
    return trainer
