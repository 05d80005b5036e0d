"""A fine-tuning: the run itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from galore_torch.optim import quantize_weights, state_bytes
from galore_torch.training import optimizers, records, restarts, sections, subspaces
from galore_torch.training.adapters import adapt, merged
from galore_torch.training.finetune.classification import Classification
from galore_torch.training.finetune.config import SECTIONS, FinetuneConfig
from galore_torch.training.finetune.data import Rows, load
from galore_torch.training.finetune.presets import made
from galore_torch.training.finetune.supervised import Supervised
from galore_torch.training.guard import deferred
from galore_torch.training.interrupt import SaveOnInterrupt
from galore_torch.training.metrics import MetricsLog
from galore_torch.training.peak_memory import peak_memory_bytes
from galore_torch.training.plots import plot_losses
from galore_torch.training.progress import LiveProgress, quiet
from galore_torch.training.run_folder import RunFolder
from galore_torch.training.subspaces import SubspaceLog
from galore_torch.training.surroundings import on_one_gpu, require_one_process, trackers

Kind = Classification | Supervised

_NOT_RECORDED = ("out", "finished", "checkpoint")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a fine-tuning came to.

    Attributes:
        out: the run folder.
        task: its name.
        optimizer: the optimizer's name.
        adapter: the adapters' name, or "none".
        finished: False if it was stopped early; there is no evaluation then.
        step: optimizer steps made, over all resumptions.
        examples: rows seen.
        eval_loss: on the held-out rows, at the end.
        scores: on the held-out rows, at the end, by name, the main one first.
        state_bytes: the optimizer's state.
        peak_memory_bytes: GPU memory if there is a GPU, the process's otherwise.
        parameters: of the model, as it is saved.
        trained_parameters: those that the optimizer moves, of the model or of its adapters.
        examples_per_second: mean over the training steps, without evaluations and saves.
        seconds: time spent in training steps.
        renewals: bases found, over all weights and resumptions; 0 for an optimizer that does not project.
        overlap: of each weight's last two subspaces, on average: 1 for the same, 0 as of random ones.
        checkpoint: where a stopped run goes on from.
    """

    out: str
    task: str
    optimizer: str
    adapter: str
    finished: bool
    step: int
    examples: int
    eval_loss: float | None
    scores: dict[str, float]
    state_bytes: int
    peak_memory_bytes: int
    parameters: int
    trained_parameters: int
    examples_per_second: float
    seconds: float
    renewals: int
    overlap: float | None
    checkpoint: str | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is ready to train: everything that could be wrong with its settings and its rows has been judged.

    Attributes:
        parameters: of the model without adapters.
    """

    config: FinetuneConfig
    folder: RunFolder
    kind: Kind
    trainer: Trainer
    log: MetricsLog
    parameters: int
    checkpoint: Path | None

    def train(self) -> Result:
        """Train to the last step or until Ctrl-C; once finished, write model, predictions, plot and the last record."""
        self.trainer.train(resume_from_checkpoint=None if self.checkpoint is None else str(self.checkpoint))
        with deferred():
            result = self._result()
            if result.finished:
                self._finish(result)
        return result

    def _result(self) -> Result:
        state = self.trainer.state
        finished = state.global_step >= state.max_steps
        checkpoint = None if finished else self.folder.last_checkpoint()
        assert self.trainer.optimizer is not None
        renewals, overlap = subspaces.summary(self.trainer.optimizer)
        examples = state.global_step * self.config.schedule.batch
        return Result(
            out=str(self.folder.root),
            task=self.config.data.task,
            optimizer=self.config.optimizer.optimizer,
            adapter=self.config.adapter.adapter,
            finished=finished,
            step=state.global_step,
            examples=examples,
            eval_loss=self.log.evaluation.get("eval_loss") if finished else None,
            scores=self.log.scores if finished else {},
            state_bytes=state_bytes(self.trainer.optimizer),
            peak_memory_bytes=peak_memory_bytes(),
            parameters=self.parameters,
            trained_parameters=self.kind.model.num_parameters(only_trainable=True),
            examples_per_second=examples / self.log.seconds if self.log.seconds else 0.0,
            seconds=self.log.seconds,
            renewals=renewals,
            overlap=overlap,
            checkpoint=None if checkpoint is None else str(checkpoint),
        )

    def _finish(self, result: Result) -> None:
        """Leave behind predictions, the model with its tokenizer, the plot and, as the sign of the end, the record."""
        lines = self.kind.predictions(self.trainer)
        self.folder.predictions.unlink(missing_ok=True)
        for line in lines:
            records.append(self.folder.predictions, line)
        if self.kind.task_type == "CAUSAL_LM":
            self.kind.model.config.use_cache = True  # for generation, by whoever loads it
        merged(self.kind.model).save_pretrained(self.folder.model)
        self.kind.tokenizer.save_pretrained(self.folder.model)
        plot_losses({self.config.title: self.folder.metrics}, self.folder.plot, "examples")
        record = {name: value for name, value in asdict(result).items() if name not in _NOT_RECORDED}
        records.append(self.folder.metrics, {"final": True, **record})


def new_run(
    config: FinetuneConfig, out: Path, *, console: Console | None = None, callbacks: Sequence[TrainerCallback] = ()
) -> Run:
    """Prepare a run in a new folder.

    Args:
        config: see `galore_torch.training.finetune.presets.configure`.
        out: the run folder, which must not hold anything yet; it is made once rows, model and optimizer stand.
        console: where progress is shown; nowhere if None.
        callbacks: further callbacks for the Trainer.

    Raises:
        ValueError: when a setting does not fit, rows or model cannot be read, or the folder holds something.
    """
    folder = RunFolder(out)
    folder.require_new()
    return _prepare(config, folder, console, callbacks, resumed=False)


def resumed_run(out: Path, *, console: Console | None = None, callbacks: Sequence[TrainerCallback] = ()) -> Run:
    """Prepare to go on with a run that was stopped, exactly: its losses will be those of one that never was.

    Args:
        out: the run folder; its own ``config.toml`` decides everything.
        console: where progress is shown; nowhere if None.
        callbacks: further callbacks for the Trainer.

    Raises:
        ValueError: when the folder holds no run, or one that has ended, or its rows have changed.
    """
    folder = RunFolder(out)
    folder.require_unfinished()
    config = made(sections.read_values(folder.config, SECTIONS)[1])
    return _prepare(config, folder, console, callbacks, resumed=True)


def _prepare(
    config: FinetuneConfig,
    folder: RunFolder,
    console: Console | None,
    callbacks: Sequence[TrainerCallback],
    *,
    resumed: bool,
) -> Run:
    console = console or Console(quiet=True)
    quiet(console)
    require_one_process("a fine-tuning")
    reported = trackers(config.schedule.report_to)
    set_seed(config.schedule.seed)
    rows = load(config.data)
    arguments = _arguments(config, folder, reported, steps_per_epoch=math.ceil(len(rows.train) / config.schedule.batch))
    kind = (Supervised if config.data.task == "sft" else Classification)(config, rows, console)
    parameters = kind.model.num_parameters()
    _prepare_weights(config, kind)
    log = MetricsLog(folder.metrics, config.schedule.batch, unit="examples", scores=kind.scores_of)
    ours = [log, SubspaceLog(folder.subspaces), LiveProgress(console, log), SaveOnInterrupt()]
    choice = {"config": config.optimizer, "seed": config.schedule.seed, "targets": config.targets}
    trainer = kind.trainer(
        arguments,
        callbacks=[*ours, *restarts.callbacks_for(config.adapter), *callbacks],
        optimizer_cls_and_kwargs=(optimizers.TrainerOptimizer, choice),
    )
    trainer.remove_callback(PrinterCallback)
    _announce(config, rows, parameters, console)
    if resumed:
        folder.require_text(rows.digest, config.data.data or config.data.task)
        folder.drop_torn_checkpoints()
    else:
        folder.create(config, rows.digest)
    return Run(
        config=config,
        folder=folder,
        kind=kind,
        trainer=trainer,
        log=log,
        parameters=parameters,
        checkpoint=folder.last_checkpoint() if resumed else None,
    )


def _prepare_weights(config: FinetuneConfig, kind: Kind) -> None:
    """Put adapters or few bits into the model, and let the optimizer judge it before anything is written."""
    adapt(kind.model, config.adapter, config.targets, task_type=kind.task_type)
    if config.optimizer.weight_bits == 8:
        stochastic = config.optimizer.weight_rounding == "stochastic"
        quantize_weights(kind.model, config.targets, stochastic_rounding=stochastic, seed=config.schedule.seed)
    optimizers.build(kind.model, config.optimizer, config.schedule.seed, config.targets)


def _announce(config: FinetuneConfig, rows: Rows, parameters: int, console: Console) -> None:
    schedule = config.schedule
    length = f"{schedule.steps:,} steps" if schedule.steps else f"{schedule.epochs:g} epochs"
    console.print(
        f"[bold]{config.title}[/] on {config.model.model} of {parameters:,} parameters; {len(rows.train):,} rows, "
        f"{len(rows.held_out):,} more held out; {length} of batches of {schedule.batch}",
        highlight=False,
        soft_wrap=True,
    )


def _arguments(
    config: FinetuneConfig, folder: RunFolder, reported: list[str], *, steps_per_epoch: int
) -> TrainingArguments:
    schedule = config.schedule
    return on_one_gpu(
        TrainingArguments(
            output_dir=str(folder.checkpoints),
            max_steps=schedule.steps or -1,
            num_train_epochs=schedule.epochs,
            per_device_train_batch_size=config.micro_batch,
            per_device_eval_batch_size=config.micro_batch,
            gradient_accumulation_steps=schedule.batch // config.micro_batch,
            learning_rate=config.optimizer.lr,
            lr_scheduler_type=schedule.decay if schedule.decay != "constant" else "constant_with_warmup",
            warmup_steps=schedule.warmup,  # below 1 it is a share of the steps
            max_grad_norm=config.optimizer.clip,
            logging_steps=1,  # a loss averaged over steps on both sides of an interruption would not be the same
            logging_nan_inf_filter=False,
            save_total_limit=1,
            seed=schedule.seed,
            data_seed=schedule.seed,
            report_to=reported,
            run_name=folder.root.name,
            disable_tqdm=True,
            bf16=False,  # weights have the dtype that the settings say, and SFTConfig would have it otherwise
            dataloader_pin_memory=torch.cuda.is_available(),
            # By steps also where an epoch is meant: the Trainer evaluates at an epoch's end after it has saved that
            # step's state, and an evaluation draws a random number, so that a run resumed from there would be another.
            eval_strategy="steps",
            eval_steps=schedule.eval_every or steps_per_epoch,
            save_strategy="steps",
            save_steps=schedule.save_every or steps_per_epoch,
        )
    )
