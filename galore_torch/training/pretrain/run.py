"""Pre-train a LLaMA from scratch on Transformers' Trainer: the run itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from galore_torch.training.baselines.layers import adapt
from galore_torch.training.pretrain.config import PretrainConfig, recorded
from galore_torch.training.pretrain.model import build_model
from galore_torch.training.run import optimizers
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.machine import ignore_accelerate, on_one_gpu, require_one_process, trackers
from galore_torch.training.run.metrics import MetricsLog
from galore_torch.training.run.run import Run, RunResult, callbacks_of, require_room, resumable, without_printer
from galore_torch.training.text import packing
from galore_torch.training.text.prepare import Text, amount, prepare_text


@dataclass(frozen=True, kw_only=True)
class PretrainResult(RunResult):
    """What a pre-training came to.

    Attributes:
        tokens: tokens seen.
        perplexity: on the held-out text, at the end; the exponential of `eval_loss`.
        tokens_per_second: mean over the training steps, without evaluations and saves.
    """

    tokens: int
    perplexity: float | None
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class PretrainRun(Run[PretrainConfig, PretrainResult]):
    """A pre-training that is ready to train."""

    def _result(self) -> PretrainResult:
        shared = self._shared()
        tokens = shared["step"] * self.config.tokens_per_step
        return PretrainResult(
            **shared,
            tokens=tokens,
            perplexity=self.log.evaluation.get("perplexity") if shared["finished"] else None,
            tokens_per_second=self._per_second(tokens),
        )


def new_run(
    config: PretrainConfig, out: Path, *, console: Console | None = None, callbacks: Sequence[TrainerCallback] = ()
) -> PretrainRun:
    """Prepare a run in a new folder.

    Args:
        config: see `galore_torch.training.pretrain.presets.configure`.
        out: the run folder, which must not hold anything yet; it is made once data, model and optimizer stand.
        console: where progress is shown; nowhere if None.
        callbacks: further callbacks for the Trainer.

    Raises:
        ValueError: when a setting does not fit, the data cannot be read, or the folder holds something.
    """
    folder = RunFolder(out)
    folder.require_new()
    with folder.being_prepared():
        return _prepare(config, folder, console, callbacks, resumed=False)


def resumed_run(out: Path, *, console: Console | None = None, callbacks: Sequence[TrainerCallback] = ()) -> PretrainRun:
    """Prepare to go on with a run that was stopped, exactly: its losses will be those of one that never was.

    Args:
        out: the run folder; its own ``config.toml`` decides everything.
        console: where progress is shown; nowhere if None.
        callbacks: further callbacks for the Trainer.

    Raises:
        ValueError: when the folder holds no run, one that has ended, one that another process works on, or only
            damaged checkpoints.
    """
    folder = RunFolder(out)
    folder.require_unfinished()
    folder.hold()
    with folder.being_prepared():
        return _prepare(recorded(folder), folder, console, callbacks, resumed=True)


def _prepare(
    config: PretrainConfig,
    folder: RunFolder,
    console: Console | None,
    callbacks: Sequence[TrainerCallback],
    *,
    resumed: bool,
) -> PretrainRun:
    console = console or Console(quiet=True)
    require_one_process("a pre-training")
    ignore_accelerate(console)
    reported = trackers(config.schedule.report_to)
    text = prepare_text(config.data, console, batch=config.schedule.batch, seed=config.schedule.seed)
    set_seed(config.schedule.seed)
    model = build_model(config, text.tokenizer)
    parameters = model.num_parameters()
    adapt(model, config.adapter, optimizers.MATRICES)
    # Made once to be judged before anything is written; the Trainer makes its own.
    judged = optimizers.build(model, config.optimizer, config.schedule.seed)
    require_room(folder, model, judged, config.optimizer)
    arguments = _arguments(config, folder, reported)
    _announce(config, parameters, text, console)
    checkpoint = None
    if resumed:
        folder.require_text(text.digest, config.data.data)
        checkpoint = resumable(folder, console)
    else:
        folder.create(config, text.digest)
    log = MetricsLog(folder.metrics, config.tokens_per_step)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=text.train,
        eval_dataset=text.held_out,
        data_collator=packing.collate,
        processing_class=text.tokenizer,
        callbacks=callbacks_of(config, folder, log, console, callbacks),
        # A factory is allowed, though the annotation names classes only.
        optimizer_cls_and_kwargs=(  # type: ignore[arg-type]
            optimizers.TrainerOptimizer,
            {"config": config.optimizer, "seed": config.schedule.seed},
        ),
    )
    return PretrainRun(
        config=config,
        folder=folder,
        model=model,
        tokenizer=text.tokenizer,
        trainer=without_printer(trainer),
        log=log,
        parameters=parameters,
        checkpoint=checkpoint,
    )


def _arguments(config: PretrainConfig, folder: RunFolder, reported: list[str]) -> TrainingArguments:
    schedule = config.schedule
    return on_one_gpu(
        TrainingArguments(
            output_dir=str(folder.checkpoints.tmp),
            max_steps=schedule.steps,
            per_device_train_batch_size=schedule.micro_batch,
            per_device_eval_batch_size=schedule.micro_batch,
            gradient_accumulation_steps=schedule.batch // schedule.micro_batch,
            learning_rate=config.optimizer.lr,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": schedule.final_lr},
            warmup_steps=round(schedule.warmup * schedule.steps),
            max_grad_norm=config.optimizer.max_grad_norm,
            logging_steps=1,  # a loss averaged over steps on both sides of an interruption would not be the same
            logging_nan_inf_filter=False,
            eval_strategy="steps",
            eval_steps=schedule.eval_every or schedule.steps,
            save_strategy="steps",
            save_steps=schedule.save_every or schedule.steps,
            prediction_loss_only=True,
            seed=schedule.seed,
            data_seed=schedule.seed,
            report_to=reported,
            run_name=folder.root.name,
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
    )


def _announce(config: PretrainConfig, parameters: int, text: Text, console: Console) -> None:
    console.print(
        f"[bold]{config.title}[/] on a LLaMA of {parameters:,} parameters; "
        f"{escape(config.data.data)} ({amount(text, config.data)}); "
        f"{config.schedule.steps:,} steps of {config.tokens_per_step:,} tokens",
        highlight=False,
        soft_wrap=True,
    )
