"""One run, whatever its job: prepared, trained, and finished or stopped so that it can be resumed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from galore_torch.integrations.callback import GaLoreCallback, figures_of, galore_in, renewals_of
from galore_torch.optim import state_bytes
from galore_torch.training.baselines import restarts
from galore_torch.training.baselines.layers import adapt, merged
from galore_torch.training.run import disk, machine, names, optimizers, processes, records, sharded
from galore_torch.training.run.callbacks import (
    EarlyStopping,
    EndAfterLastStep,
    NoStepLeftError,
    Recorder,
    SaveOnSignal,
    StepProgress,
    quiet,
)
from galore_torch.training.run.checkpoints import KEPT, step_of, stream_digest, trainer_state
from galore_torch.training.run.files import require_whole, sync, write_manifest
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.job import Job, RunResult, make_trainer
from galore_torch.training.run.plots import plot_losses
from galore_torch.training.run.signals import deferred, was_asked
from galore_torch.training.settings.config import from_values
from galore_torch.units import readable

_NOT_RECORDED = ("out", "finished", "checkpoint")


class Run:
    """A run that is ready to train: everything that could be wrong with its settings and its data has been judged.

    Made by `new_run` and `resumed_run`. It has a ``job`` with its ``config`` and ``model``, a ``folder``, a ``trainer``
    and, if it is resumed, the ``checkpoint`` from which.
    """

    def __init__(
        self,
        kind: type[Job],
        config: Any,
        folder: RunFolder,
        console: Console,
        callbacks: Sequence[TrainerCallback],
        *,
        resumed: bool,
        before: Any = None,
    ) -> None:
        quiet(console)
        config.require_there()
        names.require_token(config.schedule.push_to_hub)
        processes.require_served(config)
        console = console if processes.is_first() else Console(quiet=True)
        machine.ignore_accelerate(console)
        reported = names.trackers(config.schedule.report_to) if processes.is_first() else []
        self.job = job = kind(config, console)
        self.config, self.folder, self.model = config, folder, job.model
        self._parameters = job.model.num_parameters()
        adapt(job.model, config.adapter, job.target_modules, task_type=job.task_type)
        sharded.shard(job.model, config, job.target_modules)
        self._early = None if job.patience is None else EarlyStopping(job.patience)
        optimizer = optimizers.build(job.model, config.optimizer, config.schedule.seed, job.target_modules)
        sharded.divide_bases(optimizer, config)
        _require_room(folder, job, optimizer)
        console.print(job.announcement, highlight=False, soft_wrap=True)
        self.checkpoint: Path | None = None
        if resumed:
            folder.require_text(job.digest, job.data)
            self.checkpoint = _newest_checkpoint(folder, console)
            _require_best(folder, self.checkpoint, self._early, longer=before is not None)
            if job.stream is not None and self.checkpoint is not None:
                job.stream.go_on_from(self.checkpoint)
        else:
            folder.create(config, job.digest)
        self._console, self._end = console, EndAfterLastStep(self._early)
        self._recorder = Recorder(folder, job)
        self._progress = StepProgress(console, self._recorder)
        renewals = GaLoreCallback(on_renewal=self._recorder.record_renewal)
        ours = [self._recorder, renewals, self._progress, SaveOnSignal(), *restarts.callbacks_for(config.adapter)]
        ours += [] if self._early is None else [self._early]
        self.trainer = make_trainer(
            job,
            str(folder.checkpoints.tmp),
            optimizer,
            callbacks=[*ours, *callbacks],
            report_to=reported,
            run_name=folder.root.name,
        )
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(folder.events)  # else they lie, and go, with a checkpoint that is written
        processes.require_same_text(job.digest)
        machine.warn_of_bfloat16(self.trainer, console)
        self._planned = machine.planned_peak(job, self.trainer, console)
        name = config.schedule.push_to_hub
        self._repository = names.make_repository(name) if name is not None and processes.is_first() else None
        if before is not None and processes.is_first():
            _record_changes(folder, before, config, self.checkpoint, console)

    def train(self) -> Any:
        """Train to the last step or until Ctrl-C; once finished, write the model, the plot and the last record.

        A model that is to be pushed is uploaded then, and a `names.NotPushedError` says that it was not.
        What the run came to is returned, as the job's kind of `RunResult`.
        """
        try:
            self._make_steps()
            with deferred():
                self._take_best()
                result = self._result()
                # By all processes, of which one writes.
                weights = sharded.whole_weights(self.model) if result.finished else None
                predictions = self.job.predictions(self.trainer) if result.finished else []
                if result.finished and processes.is_first():
                    self._finish(result, weights, predictions)
            processes.wait_for_all()
            if result.finished and self._repository is not None:
                self._console.out(names.push(self.folder.model, self._repository), highlight=False)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or was_asked():
                self.folder.abandon()
            raise
        finally:
            self._progress.stop()
            self.folder.release()
        return result

    def _make_steps(self) -> None:
        """Make those that are left: none, where the process was killed between its last checkpoint and its end."""
        trainer = self.trainer
        trainer.add_callback(self._end)  # after all others
        try:
            trainer.train(resume_from_checkpoint=None if self.checkpoint is None else str(self.checkpoint))
        except NoStepLeftError:
            trainer.is_in_train = False
            trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
            if self._recorder.evaluation.get("step") != trainer.state.global_step:  # its record was lost
                trainer.evaluate()

    def _take_best(self) -> None:
        """Let a finished run's model and its scores be those of the best evaluation, where one was looked for."""
        state = self.trainer.state
        if self._end.has_come(state) and state.best_global_step:
            state.best_model_checkpoint = str(self.folder.checkpoints.of(state.best_global_step))
            self.trainer._load_best_model()
            if not self._recorder.go_back_to(state.best_global_step):  # its record was lost
                self.trainer.evaluate()

    def _result(self) -> Any:
        state, recorder, unit = self.trainer.state, self._recorder, self.job.unit
        finished = self._end.has_come(state)
        checkpoint = None if finished else self.folder.checkpoints.newest()
        optimizer = self.trainer.optimizer
        assert optimizer is not None
        galore = galore_in(optimizer)
        amount = state.global_step * self.job.units_per_step
        pace = amount / recorder.seconds if recorder.seconds else 0.0
        return self.job.result(
            out=str(self.folder.root),
            optimizer=self.config.optimizer.optim,
            adapter=self.config.adapter.adapter,
            finished=finished,
            step=state.global_step,
            best_step=state.best_global_step if finished else None,
            eval_loss=recorder.evaluation.get("eval_loss") if finished else None,
            state_bytes=state_bytes(optimizer),
            peak_memory_bytes=machine.peak_memory_bytes(),
            planned_memory_bytes=self._planned,
            parameters=self._parameters,
            trained_parameters=self.model.num_parameters(only_trainable=True),
            seconds=recorder.seconds,
            renewals=0 if galore is None else renewals_of(galore),
            overlap=None if galore is None else figures_of(galore.subspaces().values()).get("galore/overlap"),
            checkpoint=None if checkpoint is None else str(checkpoint),
            **{unit: amount, f"{unit}_per_second": pace},
            **self.job.figures(recorder.scores if finished else {}),
        )

    def _finish(self, result: RunResult, weights: dict[str, Any] | None, predictions: list[dict[str, Any]]) -> None:
        """Leave behind predictions, model, tokenizer, plot and, as the sign that all is there, the last record."""
        self.folder.predictions.unlink(missing_ok=True)
        for line in predictions:
            records.append(self.folder.predictions, line)
        self.model.config.use_cache = True  # for generation, by whoever loads it
        sharded.put_together(self.model, weights or {})
        merged(self.model).save_pretrained(self.folder.model)
        self.job.tokenizer.save_pretrained(self.folder.model)
        write_manifest(self.folder.model)
        plot_losses(self.config.title, self.folder.metrics, self.folder.plot, self.job.unit)
        for path in (*self.folder.model.rglob("*"), self.folder.model):
            sync(path)
        record = {name: value for name, value in asdict(result).items() if name not in _NOT_RECORDED}
        stream = stream_digest(self.folder.checkpoints.newest())
        records.append(self.folder.metrics, {"final": True, **record, **({"stream": stream} if stream else {})})


def new_run(
    job: type[Job],
    config: Any,
    out: Path | RunFolder,
    *,
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run:
    """Prepare a run in a new folder.

    Args:
        job: what it is of.
        config: the job's settings.
        out: the run folder, which is made once data, model and optimizer stand.
        console: where progress is shown; nowhere if None.
        callbacks: further callbacks for the Trainer.

    Raises:
        ValueError: when a setting does not fit, data or model cannot be read, or the folder holds something.

    Example:
        new_run(Pretraining, configure("llama-60m", data="texts/"), Path("runs/60m")).train()
    """
    folder = processes.run_folder(out)
    folder.require_new()
    with folder.being_prepared():
        return Run(job, config, folder, console or Console(quiet=True), callbacks, resumed=False)


def resumed_run(
    job: type[Job],
    out: Path | RunFolder,
    *,
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    changes: Mapping[str, Any] | None = None,
) -> Run:
    """Prepare to resume a run that was stopped, exactly: its losses will be those of one that never was.

    The arguments are those of `new_run`; the settings are those of the folder's ``config.toml``, but for ``changes``,
    by name, of `galore_torch.training.run.folder.CHANGEABLE`. More ``steps`` or ``epochs`` extend a run, also one that
    has ended: its learning rate goes on by the schedule of the new length.

    Raises:
        ValueError: when the folder holds no run, one that has ended, one that another process works on, or only
            damaged checkpoints, or its data have changed, or a change is not allowed.

    Example:
        resumed_run(Pretraining, Path("runs/60m"), changes={"steps": 20_000}).train()
    """
    folder = processes.run_folder(out)
    changes = folder.require_unfinished(changes)
    folder.hold()
    with folder.being_prepared():
        before = job.recorded(folder)
        config: Any = from_values(job.settings, {**_by_name(before), **changes})
        if "epochs" in changes and config.schedule.steps is not None:
            raise ValueError(
                f"epochs = {changes['epochs']} has no effect on a run whose length is told in steps; give --steps."
            )
        console, before = console or Console(quiet=True), before if changes else None
        return Run(job, config, folder, console, callbacks, resumed=True, before=before)


def _by_name(config: Any) -> dict[str, Any]:
    return {name: value for section in asdict(config).values() for name, value in section.items()}


def _record_changes(folder: RunFolder, before: Any, now: Any, checkpoint: Path | None, console: Console) -> None:
    old, new = _by_name(before), _by_name(now)
    changed = {name: [old[name], value] for name, value in new.items() if value != old[name]}
    step = 0 if checkpoint is None else step_of(checkpoint)
    folder.record_changes(step, changed)
    for name, (was, value) in changed.items():
        also = "; the learning rate goes on by the schedule of the new length" if name in ("steps", "epochs") else ""
        line = f"From step {step:,} on {name} = {value}, not {was}{also}."
        console.out(line, highlight=False)


def _require_best(folder: RunFolder, checkpoint: Path | None, early: EarlyStopping | None, *, longer: bool) -> None:
    """Refuse a run whose best checkpoint is damaged, or that is made longer though its patience has come to an end."""
    best = folder.checkpoints.best(checkpoint)
    if best is not None:
        require_whole("out", str(folder.root), best)
    known = trainer_state(checkpoint).get("stateful_callbacks", {}).get(EarlyStopping.__name__)
    if longer and early is not None and known is not None:
        count = known["attributes"]["early_stopping_patience_counter"]
        if count >= early.early_stopping_patience:
            raise ValueError(
                f"early_stopping_patience = {early.early_stopping_patience}, and {count} evaluations in a row were no "
                f"better; give more than {count} to go on."
            )


def _require_room(folder: RunFolder, job: Job, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a disk on which less is free than the model and its checkpoints take at least."""
    tensors = (*job.model.parameters(), *job.model.buffers())
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    checkpoint = weights + optimizers.least_state_bytes(optimizer, job.config.optimizer)
    there = len(folder.checkpoints.newest_first())
    kept = KEPT + 2 * ("metric_for_best_model" in job.schedule())  # the best ones until each of the last
    needed = weights + max(1, kept + 1 - there) * checkpoint  # one more while it is written
    free = disk.free_bytes(folder.root)
    if free < needed:
        raise ValueError(
            f"out = {str(folder.root)!r} is on a disk with {readable(free)} free, and the run writes "
            f"{readable(needed)}: checkpoints of {readable(checkpoint)} each and the model of {readable(weights)}. "
            "Free some space, or choose another --out."
        )


def _newest_checkpoint(folder: RunFolder, console: Console) -> Path | None:
    """The newest whole checkpoint; None if there is none, and the run starts over. Nothing of that is silent."""
    folder.checkpoints.clear()
    lines: list[str] = []
    found = folder.checkpoints.newest_whole(lines.append)
    if found is None:
        lines.append(f"{folder.root} has no checkpoint; its run starts over.")
    elif not folder.metrics.exists():
        lost = "what was recorded until now is lost, the training goes on as it was."
        lines.append(f"{folder.metrics} is missing: {lost}")
    for line in lines:
        if console.quiet:
            warnings.warn(line, stacklevel=4)  # at the call of resumed_run
        else:
            console.out(line, highlight=False)
    return found
