"""A run that is ready to train, and what it comes to: all that a pre-training and a fine-tuning have in common."""

# ruff: noqa: ARG002 - a callback takes whatever the Trainer hands to every callback

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from rich.console import Console
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from galore_torch.integrations.callback import GaLoreCallback, figures_of, galore_in, renewals_of
from galore_torch.optim import state_bytes
from galore_torch.optim.subspaces import Subspace
from galore_torch.training.baselines import restarts
from galore_torch.training.baselines.layers import merged
from galore_torch.training.run import optimizers, records
from galore_torch.training.run.checkpoints import KEPT
from galore_torch.training.run.disk import require_space
from galore_torch.training.run.files import sync
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.interrupt import SaveOnInterrupt
from galore_torch.training.run.machine import peak_memory_bytes
from galore_torch.training.run.manifest import write_manifest
from galore_torch.training.run.metrics import MetricsLog
from galore_torch.training.run.plots import plot_losses
from galore_torch.training.run.progress import LiveProgress
from galore_torch.training.run.saving import CompleteCheckpoints
from galore_torch.training.run.stopping import deferred, was_asked
from galore_torch.training.run.units import megabytes
from galore_torch.training.settings.adapter import AdapterConfig
from galore_torch.training.settings.optimizer import OptimizerConfig

_NOT_RECORDED = ("out", "finished", "checkpoint")


class RunConfig(Protocol):
    """What a run asks of its settings."""

    @property
    def title(self) -> str:
        """What is trained in a word or two."""
        ...

    @property
    def optimizer(self) -> OptimizerConfig:
        """The optimizer's settings."""
        ...

    @property
    def adapter(self) -> AdapterConfig:
        """The adapters' settings, as resolved."""
        ...


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to.

    Attributes:
        out: the run folder.
        optimizer: the optimizer's name.
        adapter: the adapters' name, or "none".
        finished: False if it was stopped early; what needs an evaluation is then None.
        step: optimizer steps made, over all resumptions.
        eval_loss: on what is held out, at the end; nats per token of a language model.
        state_bytes: the optimizer's state.
        peak_memory_bytes: GPU memory if there is a GPU, the process's otherwise.
        parameters: of the model, as it is saved.
        trained_parameters: those that the optimizer moves, of the model or of its adapters.
        seconds: time spent in training steps.
        renewals: bases found, over all weights and resumptions; 0 for an optimizer that does not project.
        overlap: of each weight's last two subspaces, on average: 1 for the same, 0 as of random ones.
        checkpoint: where a stopped run goes on from.
    """

    out: str
    optimizer: str
    adapter: str
    finished: bool
    step: int
    eval_loss: float | None
    state_bytes: int
    peak_memory_bytes: int
    parameters: int
    trained_parameters: int
    seconds: float
    renewals: int
    overlap: float | None
    checkpoint: str | None


ConfigT = TypeVar("ConfigT", bound=RunConfig)
ResultT = TypeVar("ResultT", bound=RunResult)


@dataclass(frozen=True, kw_only=True)
class Run(ABC, Generic[ConfigT, ResultT]):
    """A run that is ready to train: everything that could be wrong with its settings and its data has been judged.

    Attributes:
        config: its settings.
        folder: where it leaves what it makes.
        model: with its adapters, if it has any.
        tokenizer: the model's.
        trainer: with `callbacks_of` among its callbacks.
        log: the first of them.
        parameters: of the model without adapters.
        checkpoint: where it goes on from.
    """

    config: ConfigT
    folder: RunFolder
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    trainer: Trainer
    log: MetricsLog
    parameters: int
    checkpoint: Path | None

    def train(self) -> ResultT:
        """Train to the last step or until Ctrl-C; once finished, write the model, the plot and the last record."""
        try:
            self._make_steps()
            with deferred():
                result = self._result()
                if result.finished and self.trainer.is_world_process_zero():
                    self._finish(result)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or was_asked():
                self.folder.abandon()
            raise
        finally:
            self.folder.release()
        return result

    def _make_steps(self) -> None:
        """Make those that are left: none, where the process was killed between its last checkpoint and its end."""
        trainer = self.trainer
        trainer.add_callback(_NoneBeyondTheLast())  # after all others
        try:
            trainer.train(resume_from_checkpoint=None if self.checkpoint is None else str(self.checkpoint))
        except _NoStepLeftError:
            trainer.is_in_train = False
            trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
            if self.log.evaluation.get("step") != trainer.state.global_step:  # its record was lost
                trainer.evaluate()

    @abstractmethod
    def _result(self) -> ResultT:
        """`_shared`, and what this kind of run has besides."""

    def _shared(self) -> dict[str, Any]:
        """The fields of `RunResult` by name."""
        state, optimizer = self.trainer.state, self.trainer.optimizer
        assert optimizer is not None
        finished = state.global_step >= state.max_steps
        checkpoint = None if finished else self.folder.checkpoints.newest()
        galore = galore_in(optimizer)
        return {
            "out": str(self.folder.root),
            "optimizer": self.config.optimizer.optim,
            "adapter": self.config.adapter.adapter,
            "finished": finished,
            "step": state.global_step,
            "eval_loss": self.log.evaluation.get("eval_loss") if finished else None,
            "state_bytes": state_bytes(optimizer),
            "peak_memory_bytes": peak_memory_bytes(),
            "parameters": self.parameters,
            "trained_parameters": self.model.num_parameters(only_trainable=True),
            "seconds": self.log.seconds,
            "renewals": 0 if galore is None else renewals_of(galore),
            "overlap": None if galore is None else figures_of(galore.subspaces().values()).get("galore/overlap"),
            "checkpoint": None if checkpoint is None else str(checkpoint),
        }

    def _per_second(self, amount: int) -> float:
        """An amount by the time that training it took."""
        return amount / self.log.seconds if self.log.seconds else 0.0

    def _finish(self, result: ResultT) -> None:
        """Leave behind the model with its tokenizer, the plot and, as the sign that all is there, the last record."""
        self.model.config.use_cache = True  # for generation, by whoever loads it
        merged(self.model).save_pretrained(self.folder.model)
        self.tokenizer.save_pretrained(self.folder.model)
        write_manifest(self.folder.model)
        plot_losses(self.config.title, self.folder.metrics, self.folder.plot, self.log.unit)
        for path in (*self.folder.model.rglob("*"), self.folder.model):
            sync(path)
        record = {name: value for name, value in asdict(result).items() if name not in _NOT_RECORDED}
        records.append(self.folder.metrics, {"final": True, **record})


def require_room(
    folder: RunFolder, model: PreTrainedModel, optimizer: torch.optim.Optimizer, config: OptimizerConfig
) -> None:
    """Refuse a disk that will be full before the run has ended.

    Args:
        folder: of the run.
        model: with its adapters.
        optimizer: of its weights.
        config: of the optimizer.

    Raises:
        ValueError: when less is free than the model and its checkpoints take at least.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    checkpoint = weights + optimizers.least_state_bytes(optimizer, config)
    there = len(folder.checkpoints.newest_first())
    needed = weights + max(1, KEPT + 1 - there) * checkpoint  # one more while it is written
    what = f"checkpoints of {megabytes(checkpoint)} each and the model of {megabytes(weights)}"
    require_space(folder.root, needed, what)


class _NoStepLeftError(Exception):
    """Every step had been made when the Trainer was about to begin."""


class _NoneBeyondTheLast(TrainerCallback):
    """Stops a Trainer that was resumed after its last step, which would make one more before it looks at the end."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop if no step is left: model, optimizer and records are as the checkpoint has them by now."""
        if state.global_step >= state.max_steps:
            raise _NoStepLeftError


def resumable(folder: RunFolder, console: Console) -> Path | None:
    """What a run goes on from: its newest checkpoint that is whole.

    Args:
        folder: of the run, which this process holds.
        console: where it is said if that is not the newest one; if it shows nothing, that is a warning.

    Returns:
        The checkpoint; None if there is none, and the run starts again.

    Raises:
        ValueError: when there are checkpoints, and all are damaged.
    """
    folder.checkpoints.clear()
    told: list[str] = []
    found = folder.checkpoints.newest_whole(told.append)
    if found is None:
        told.append(f"{folder.root} has no checkpoint; its run starts again.")
    for line in told:
        if console.quiet:
            warnings.warn(line, stacklevel=4)  # at the call of resumed_run
        else:
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    return found


def callbacks_of(
    config: RunConfig, folder: RunFolder, log: MetricsLog, console: Console, more: Sequence[TrainerCallback]
) -> list[TrainerCallback]:
    """What watches and steers every run: records, display, Ctrl-C and restarts.

    Args:
        config: of the run.
        folder: its folder.
        log: its records.
        console: where progress is shown.
        more: further ones, which come last.
    """

    def record(step: int, weight: str, subspace: Subspace) -> None:
        records.append(folder.subspaces, {"step": step, "weight": weight, **asdict(subspace)})

    complete = CompleteCheckpoints(folder.checkpoints, [folder.metrics, folder.subspaces])  # its time is not the log's
    ours = [complete, log, GaLoreCallback(on_renewal=record), LiveProgress(console, log), SaveOnInterrupt()]
    return [*ours, *restarts.callbacks_for(config.adapter), *more]


def without_printer(trainer: Trainer) -> Trainer:
    """Take away the Trainer's own lines: ours are shown."""
    trainer.remove_callback(PrinterCallback)
    return trainer
