"""A fine-tuning: what classification and the stages of TRL have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from transformers import Trainer, TrainingArguments, set_seed

from galore_torch.lowbit import quantize_weights
from galore_torch.training.finetune.classification import Classification
from galore_torch.training.finetune.config import FinetuneConfig
from galore_torch.training.finetune.data import Rows, load
from galore_torch.training.finetune.on_trl import STAGES
from galore_torch.training.run.base_model import recompute_activations
from galore_torch.training.run.job import Job, RunResult
from galore_torch.training.run.records import perplexity
from galore_torch.training.text.row_checks import shared_rows, tell_rows


@dataclass(frozen=True, kw_only=True)
class FinetuneResult(RunResult):
    """What a fine-tuning came to."""

    task: str
    examples: int  # rows seen
    guess: float | None  # accuracy of saying the commonest label always, where labels are classes
    scores: dict[str, float]  # on the held-out rows, at the end, by name, the main one first
    examples_per_second: float  # mean over the training steps, without evaluations and saves

    @property
    def headline(self) -> str:
        """The scores."""
        return "  ".join(f"{name} {value:.4f}" for name, value in self.scores.items())

    @property
    def remarks(self) -> list[str]:
        """That the training has failed, or that a guess would have been as good."""
        remarks = super().remarks
        if self.eval_loss is None or not math.isfinite(self.eval_loss):
            remarks.append("The loss on held-out rows is not finite, and the model is of no use: lower --lr.")
        elif self.guess is not None and self.scores.get("accuracy", math.inf) <= self.guess:
            always = f"To say the commonest label always is right in {self.guess:.4f} of them"
            remarks.append(f"{always}: make more steps, or raise --lr.")
        return remarks


class Finetuning(Job):
    """A fine-tuning of a pretrained model on rows, whose ``kind`` says what they are and what is learnt from them.

    Args:
        config: its settings, see `galore_torch.training.finetune.presets.configure`.
        console: where progress is shown.
        rows: in the place of those that the settings name.
    """

    unit = "examples"
    settings = FinetuneConfig
    result = FinetuneResult

    def __init__(self, config: FinetuneConfig, console: Console, rows: Rows | None = None) -> None:
        schedule = config.schedule
        set_seed(schedule.seed)
        if rows is None:
            rows = load(config.data)
            if config.data.held_out is not None:
                tell_rows(console, shared_rows(rows.train, rows.held_out), "held out and trained on, too")
        self.config, self.target_modules = config, config.target_modules
        self.data = config.data.data or config.data.task
        self.digest, self.units_per_step = rows.digest, schedule.batch
        self.kind = STAGES.get(config.data.task, Classification)(config, rows, console)
        if self.kind.cut:
            console.print(f"{self.kind.cut:,} rows are longer than {config.data.max_length} tokens and are truncated.")
        self.patience = schedule.early_stopping_patience
        self._measured = {**self.kind.measured, "loss": "eval_loss"}
        config.require_measured(self.kind.measured)
        repeats = config.data.generations if config.data.task == "grpo" else 1  # rows of a batch that are the same
        self._steps_per_epoch = math.ceil(len(rows.train) * repeats / schedule.batch)
        self.model, self.tokenizer, self.task_type = self.kind.model, self.kind.tokenizer, self.kind.task_type
        if schedule.gradient_checkpointing:
            recompute_activations(self.model)
        if config.optimizer.weight_bits == 8:
            stochastic = config.optimizer.weight_rounding == "stochastic"
            quantize_weights(self.model, config.target_modules, stochastic_rounding=stochastic, seed=schedule.seed)
        length = f"{schedule.steps:,} steps" if schedule.steps else f"{schedule.epochs:g} epochs"
        self.announcement = (
            f"[bold]{config.title}[/] on {escape(config.model.model)} of {self.model.num_parameters():,} parameters; "
            f"{len(rows.train):,} rows, {len(rows.held_out):,} more held out; "
            f"{length} of batches of {schedule.batch}"
        )

    def schedule(self) -> dict[str, Any]:
        """Steps or epochs; a warmup, then what the settings say of the learning rate."""
        schedule, of_best = self.config.schedule, {}
        eval_steps = save_steps = schedule.eval_every or self._steps_per_epoch
        if schedule.load_best_model_at_end:  # the state of each evaluation is saved
            best = schedule.metric_for_best_model or next(iter(self._measured))
            of_best["metric_for_best_model"] = self._measured[best]
        else:
            save_steps = schedule.save_every or self._steps_per_epoch
        return {
            "max_steps": schedule.steps or -1,
            "num_train_epochs": schedule.epochs,
            "lr_scheduler_type": schedule.decay if schedule.decay != "constant" else "constant_with_warmup",
            "warmup_steps": schedule.warmup,  # below 1 it is a share of the steps
            "bf16": schedule.bf16,
            "use_cpu": schedule.bf16 and not torch.cuda.is_available(),  # else Transformers refuses bf16 on a CPU
            "eval_steps": eval_steps,
            "save_steps": save_steps,
            **of_best,
        }

    def trainer(self, args: TrainingArguments, **more: Any) -> Trainer:
        """That of the kind."""
        kind = self.kind
        data = {"train_dataset": kind.train, "eval_dataset": kind.held_out}
        return kind.trainer(args, model=self.model, processing_class=self.tokenizer, **data, **more)

    def scores(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Those of the kind; a loss is told as perplexity."""
        found = {name: metrics[metric] for name, metric in self.kind.measured.items()}
        return {name: perplexity(one) if name == "perplexity" else one for name, one in found.items()}

    def figures(self, scores: dict[str, Any]) -> dict[str, Any]:
        """The task, its scores, and what they are to be compared with."""
        return {"task": self.config.data.task, "scores": scores, "guess": self.kind.guess}

    def predictions(self, trainer: Trainer) -> list[dict[str, Any]]:
        """Those of the kind."""
        return self.kind.predictions(trainer)
