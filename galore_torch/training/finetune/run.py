"""A fine-tuning: the run itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from transformers import TrainerCallback, TrainingArguments, set_seed

from galore_torch.optim import quantize_weights
from galore_torch.training.baselines.layers import adapt
from galore_torch.training.finetune.classification import Classification
from galore_torch.training.finetune.config import SECTIONS, FinetuneConfig
from galore_torch.training.finetune.data import Rows, load
from galore_torch.training.finetune.presets import made
from galore_torch.training.finetune.supervised import Supervised
from galore_torch.training.run import optimizers, records
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.machine import ignore_accelerate, on_one_gpu, require_one_process, trackers
from galore_torch.training.run.metrics import MetricsLog
from galore_torch.training.run.progress import quiet
from galore_torch.training.run.run import Run, RunResult, callbacks_of, require_room, resumable, without_printer
from galore_torch.training.settings import sections

Kind = Classification | Supervised


@dataclass(frozen=True, kw_only=True)
class FinetuneResult(RunResult):
    """What a fine-tuning came to.

    Attributes:
        task: its name.
        examples: rows seen.
        scores: on the held-out rows, at the end, by name, the main one first.
        examples_per_second: mean over the training steps, without evaluations and saves.
    """

    task: str
    examples: int
    scores: dict[str, float]
    examples_per_second: float


@dataclass(frozen=True, kw_only=True)
class FinetuneRun(Run[FinetuneConfig, FinetuneResult]):
    """A fine-tuning that is ready to train.

    Attributes:
        kind: what its rows are.
    """

    kind: Kind

    def _result(self) -> FinetuneResult:
        shared = self._shared()
        examples = shared["step"] * self.config.schedule.batch
        return FinetuneResult(
            **shared,
            task=self.config.data.task,
            examples=examples,
            scores=self.log.scores if shared["finished"] else {},
            examples_per_second=self._per_second(examples),
        )

    def _finish(self, result: FinetuneResult) -> None:
        """Leave behind what the model says of the held-out rows, before all else."""
        lines = self.kind.predictions(self.trainer)
        self.folder.predictions.unlink(missing_ok=True)
        for line in lines:
            records.append(self.folder.predictions, line)
        super()._finish(result)


def new_run(
    config: FinetuneConfig, out: Path, *, console: Console | None = None, callbacks: Sequence[TrainerCallback] = ()
) -> FinetuneRun:
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
    with folder.being_prepared():
        return _prepare(config, folder, console, callbacks, resumed=False)


def resumed_run(out: Path, *, console: Console | None = None, callbacks: Sequence[TrainerCallback] = ()) -> FinetuneRun:
    """Prepare to go on with a run that was stopped, exactly: its losses will be those of one that never was.

    Args:
        out: the run folder; its own ``config.toml`` decides everything.
        console: where progress is shown; nowhere if None.
        callbacks: further callbacks for the Trainer.

    Raises:
        ValueError: when the folder holds no run, one that has ended, one that another process works on, or only
            damaged checkpoints, or its rows have changed.
    """
    folder = RunFolder(out)
    folder.require_unfinished()
    folder.hold()
    with folder.being_prepared():
        folder.require_settings()
        config = made(sections.read_values(folder.config, SECTIONS)[1])
        return _prepare(config, folder, console, callbacks, resumed=True)


def _prepare(
    config: FinetuneConfig,
    folder: RunFolder,
    console: Console | None,
    callbacks: Sequence[TrainerCallback],
    *,
    resumed: bool,
) -> FinetuneRun:
    console = console or Console(quiet=True)
    quiet(console)
    require_one_process("a fine-tuning")
    ignore_accelerate(console)
    reported = trackers(config.schedule.report_to)
    set_seed(config.schedule.seed)
    rows = load(config.data)
    arguments = _arguments(config, folder, reported, steps_per_epoch=math.ceil(len(rows.train) / config.schedule.batch))
    kind = (Supervised if config.data.task == "sft" else Classification)(config, rows, console)
    parameters = kind.model.num_parameters()
    require_room(folder, kind.model, _prepare_weights(config, kind), config.optimizer)
    _announce(config, rows, parameters, console)
    checkpoint = None
    if resumed:
        folder.require_text(rows.digest, config.data.data or config.data.task)
        checkpoint = resumable(folder, console)
    else:
        folder.create(config, rows.digest)
    log = MetricsLog(folder.metrics, config.schedule.batch, unit="examples", scores=kind.scores_of)
    choice = {"config": config.optimizer, "seed": config.schedule.seed, "targets": config.target_modules}
    trainer = kind.trainer(
        arguments,
        callbacks=callbacks_of(config, folder, log, console, callbacks),
        optimizer_cls_and_kwargs=(optimizers.TrainerOptimizer, choice),
    )
    return FinetuneRun(
        config=config,
        folder=folder,
        kind=kind,
        model=kind.model,
        tokenizer=kind.tokenizer,
        trainer=without_printer(trainer),
        log=log,
        parameters=parameters,
        checkpoint=checkpoint,
    )


def _prepare_weights(config: FinetuneConfig, kind: Kind) -> torch.optim.Optimizer:
    """Put adapters or few bits into the model, and let an optimizer judge it before anything is written."""
    adapt(kind.model, config.adapter, config.target_modules, task_type=kind.task_type)
    if config.optimizer.weight_bits == 8:
        stochastic = config.optimizer.weight_rounding == "stochastic"
        quantize_weights(kind.model, config.target_modules, stochastic_rounding=stochastic, seed=config.schedule.seed)
    return optimizers.build(kind.model, config.optimizer, config.schedule.seed, config.target_modules)


def _announce(config: FinetuneConfig, rows: Rows, parameters: int, console: Console) -> None:
    schedule = config.schedule
    length = f"{schedule.steps:,} steps" if schedule.steps else f"{schedule.epochs:g} epochs"
    console.print(
        f"[bold]{config.title}[/] on {escape(config.model.model)} of {parameters:,} parameters; "
        f"{len(rows.train):,} rows, "
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
            output_dir=str(folder.checkpoints.tmp),
            max_steps=schedule.steps or -1,
            num_train_epochs=schedule.epochs,
            per_device_train_batch_size=config.micro_batch,
            per_device_eval_batch_size=config.micro_batch,
            gradient_accumulation_steps=schedule.batch // config.micro_batch,
            learning_rate=config.optimizer.lr,
            lr_scheduler_type=schedule.decay if schedule.decay != "constant" else "constant_with_warmup",
            warmup_steps=schedule.warmup,  # below 1 it is a share of the steps
            max_grad_norm=config.optimizer.max_grad_norm,
            logging_steps=1,  # a loss averaged over steps on both sides of an interruption would not be the same
            logging_nan_inf_filter=False,
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
