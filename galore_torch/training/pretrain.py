"""Pre-train a LLaMA from scratch on Transformers' Trainer: the run itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from galore_torch.optim import state_bytes
from galore_torch.training import optimizers, packing, records, restarts, subspaces
from galore_torch.training.adapters import adapt, merged
from galore_torch.training.config import PretrainConfig
from galore_torch.training.guard import deferred
from galore_torch.training.interrupt import SaveOnInterrupt
from galore_torch.training.metrics import MetricsLog
from galore_torch.training.model import build_model
from galore_torch.training.peak_memory import peak_memory_bytes
from galore_torch.training.plots import plot_losses
from galore_torch.training.progress import LiveProgress
from galore_torch.training.run_folder import RunFolder
from galore_torch.training.subspaces import SubspaceLog
from galore_torch.training.surroundings import on_one_gpu, require_one_process, trackers
from galore_torch.training.text import Text, amount, prepare_text

# What of a result is recorded in metrics.jsonl.
_FINAL = (
    "step", "tokens", "eval_loss", "perplexity", "state_bytes", "peak_memory_bytes", "parameters", "trained_parameters",
    "tokens_per_second", "seconds", "renewals", "overlap",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to.

    Attributes:
        out: the run folder.
        optimizer: the optimizer's name.
        adapter: the adapters' name, or "none".
        finished: False if it was stopped early; what needs an evaluation is then None.
        step: optimizer steps made, over all resumptions.
        tokens: tokens seen.
        perplexity: on the held-out text, at the end.
        eval_loss: its logarithm, nats per token.
        state_bytes: the optimizer's state.
        peak_memory_bytes: GPU memory if there is a GPU, the process's otherwise.
        parameters: of the model, as it is saved.
        trained_parameters: those that the optimizer moves, of the model or of its adapters.
        tokens_per_second: mean over the training steps, without evaluations and saves.
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
    tokens: int
    perplexity: float | None
    eval_loss: float | None
    state_bytes: int
    peak_memory_bytes: int
    parameters: int
    trained_parameters: int
    tokens_per_second: float
    seconds: float
    renewals: int
    overlap: float | None
    checkpoint: str | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is ready to train: everything that could be wrong with its settings and its data has been judged.

    Attributes:
        parameters: of the model without adapters.
    """

    config: PretrainConfig
    folder: RunFolder
    model: LlamaForCausalLM
    trainer: Trainer
    log: MetricsLog
    tokenizer: PreTrainedTokenizerBase
    parameters: int
    checkpoint: Path | None

    def train(self) -> RunResult:
        """Train to the last step or until Ctrl-C; once finished, write the model, the plot and the last record."""
        self.trainer.train(resume_from_checkpoint=None if self.checkpoint is None else str(self.checkpoint))
        with deferred():
            result = _result(self)
            if result.finished and self.trainer.is_world_process_zero():
                _finish(self, result)
        return result


def new_run(
    config: PretrainConfig, out: Path, *, console: Console | None = None, callbacks: Sequence[TrainerCallback] = ()
) -> Run:
    """Prepare a run in a new folder.

    Args:
        config: see `galore_torch.training.presets.configure`.
        out: the run folder, which must not hold anything yet; it is made once data, model and optimizer stand.
        console: where progress is shown; nowhere if None.
        callbacks: further callbacks for the Trainer.

    Raises:
        ValueError: when a setting does not fit, the data cannot be read, or the folder holds something.
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
        ValueError: when the folder holds no run, or one that has ended.
    """
    folder = RunFolder(out)
    folder.require_unfinished()
    return _prepare(folder.read_config(), folder, console, callbacks, resumed=True)


def _prepare(
    config: PretrainConfig,
    folder: RunFolder,
    console: Console | None,
    callbacks: Sequence[TrainerCallback],
    *,
    resumed: bool,
) -> Run:
    console = console or Console(quiet=True)
    require_one_process("a pre-training")
    reported = trackers(config.schedule.report_to)
    text = prepare_text(config, console)
    set_seed(config.schedule.seed)
    model = build_model(config, text.tokenizer)
    parameters = model.num_parameters()
    adapt(model, config.adapter, optimizers.MATRICES)
    # Made once to be judged before anything is written; the Trainer makes its own.
    optimizers.build(model, config.optimizer, config.schedule.seed)
    arguments = _arguments(config, folder, reported)
    _announce(config, parameters, text, console)
    if resumed:
        folder.require_text(text.digest, config.data.data)
        folder.drop_torn_checkpoints()
    else:
        folder.create(config, text.digest)
    log = MetricsLog(folder.metrics, config.tokens_per_step)
    ours = [log, SubspaceLog(folder.subspaces), LiveProgress(console, log), SaveOnInterrupt()]
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=text.train,
        eval_dataset=text.held_out,
        data_collator=packing.collate,
        processing_class=text.tokenizer,
        callbacks=[*ours, *restarts.callbacks_for(config.adapter), *callbacks],
        # A factory is allowed, though the annotation names classes only.
        optimizer_cls_and_kwargs=(  # type: ignore[arg-type]
            optimizers.TrainerOptimizer,
            {"config": config.optimizer, "seed": config.schedule.seed},
        ),
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = folder.last_checkpoint() if resumed else None
    return Run(
        config=config,
        folder=folder,
        model=model,
        trainer=trainer,
        log=log,
        tokenizer=text.tokenizer,
        parameters=parameters,
        checkpoint=checkpoint,
    )


def _arguments(config: PretrainConfig, folder: RunFolder, reported: list[str]) -> TrainingArguments:
    schedule = config.schedule
    return on_one_gpu(
        TrainingArguments(
            output_dir=str(folder.checkpoints),
            max_steps=schedule.steps,
            per_device_train_batch_size=schedule.micro_batch,
            per_device_eval_batch_size=schedule.micro_batch,
            gradient_accumulation_steps=schedule.batch // schedule.micro_batch,
            learning_rate=config.optimizer.lr,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": schedule.final_lr},
            warmup_steps=round(schedule.warmup * schedule.steps),
            max_grad_norm=config.optimizer.clip,
            logging_steps=1,  # a loss averaged over steps on both sides of an interruption would not be the same
            logging_nan_inf_filter=False,
            eval_strategy="steps",
            eval_steps=schedule.eval_every or schedule.steps,
            save_strategy="steps",
            save_steps=schedule.save_every or schedule.steps,
            save_total_limit=1,
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
        f"{config.data.data} ({amount(text, config)}); "
        f"{config.schedule.steps:,} steps of {config.tokens_per_step:,} tokens",
        highlight=False,
        soft_wrap=True,
    )


def _result(run: Run) -> RunResult:
    step = run.trainer.state.global_step
    assert run.trainer.optimizer is not None
    finished = step >= run.config.schedule.steps
    checkpoint = None if finished else run.folder.last_checkpoint()
    evaluation = run.log.evaluation if finished else {}
    tokens = step * run.config.tokens_per_step
    renewals, overlap = subspaces.summary(run.trainer.optimizer)
    return RunResult(
        out=str(run.folder.root),
        optimizer=run.config.optimizer.optimizer,
        adapter=run.config.adapter.adapter,
        finished=finished,
        step=step,
        tokens=tokens,
        perplexity=evaluation.get("perplexity"),
        eval_loss=evaluation.get("eval_loss"),
        state_bytes=state_bytes(run.trainer.optimizer),
        peak_memory_bytes=peak_memory_bytes(),
        parameters=run.parameters,
        trained_parameters=run.model.num_parameters(only_trainable=True),
        tokens_per_second=tokens / run.log.seconds if run.log.seconds else 0.0,
        seconds=run.log.seconds,
        renewals=renewals,
        overlap=overlap,
        checkpoint=None if checkpoint is None else str(checkpoint),
    )


def _finish(run: Run, result: RunResult) -> None:
    """Leave behind the model with its tokenizer, the plot and, as the sign that all is there, the last record."""
    run.model.config.use_cache = True  # for generation, by whoever loads it
    merged(run.model).save_pretrained(run.folder.model)
    run.tokenizer.save_pretrained(run.folder.model)
    plot_losses({run.config.title: run.folder.metrics}, run.folder.plot)
    record = {name: getattr(result, name) for name in _FINAL}
    records.append(run.folder.metrics, {"final": True, **record})
