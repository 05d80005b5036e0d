"""Pre-train a LLaMA from scratch: the job's data, model and schedule."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from galore_torch.training.pretrain.config import PretrainConfig
from galore_torch.training.pretrain.model import build_model, load_llama
from galore_torch.training.run import optimizers, records
from galore_torch.training.run.job import Job
from galore_torch.training.run.run import RunResult
from galore_torch.training.text import packing
from galore_torch.training.text.prepare import amount, prepare_text


@dataclass(frozen=True, kw_only=True)
class PretrainResult(RunResult):
    """What a pre-training came to."""

    tokens: int  # seen
    perplexity: float | None  # on the held-out text, at the end; the exponential of `eval_loss`
    tokens_per_second: float  # mean over the training steps, without evaluations and saves

    @property
    def headline(self) -> str:
        """Perplexity and tokens a second."""
        return f"perplexity {self.perplexity:,.2f}  {self.tokens_per_second:,.0f} tok/s"


class Pretraining(Job):
    """A pre-training of a LLaMA with newly initialized weights.

    Args:
        config: its settings, see `galore_torch.training.pretrain.presets.configure`.
        console: where progress is shown.
        model: with weights to start from; None for newly initialized ones.
    """

    unit = "tokens"
    in_processes = True
    settings = PretrainConfig
    result = PretrainResult

    def __init__(self, config: PretrainConfig, console: Console, model: PreTrainedModel | None = None) -> None:
        schedule = config.schedule
        self.config, self.data, self.target_modules = config, config.data.data, optimizers.MATRICES
        self.text = prepare_text(config.data, console, batch=schedule.batch, seed=schedule.seed)
        self.tokenizer, self.digest = self.text.tokenizer, self.text.digest
        set_seed(schedule.seed)
        self.model = model or build_model(config, self.tokenizer)
        self.units_per_step = config.tokens_per_step
        self.announcement = (
            f"[bold]{config.title}[/] on a LLaMA of {self.model.num_parameters():,} parameters; "
            f"{escape(self.data)} ({amount(self.text, config.data)}); "
            f"{schedule.steps:,} steps of {config.tokens_per_step:,} tokens"
        )

    @classmethod
    def load(cls, config: PretrainConfig, console: Console, weights: Path | None = None) -> Pretraining:
        """Read, tokenize and pack the text; make or load the model."""
        if weights is None:
            return cls(config, console)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(weights)))
        return cls(config, console, load_llama(weights, config))

    def schedule(self) -> dict[str, Any]:
        """A warmup, then a cosine down to a share of the peak."""
        schedule = self.config.schedule
        return {
            "max_steps": schedule.steps,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": schedule.final_lr},
            "warmup_steps": round(schedule.warmup * schedule.steps),
            "eval_steps": schedule.eval_every or schedule.steps,
            "save_steps": schedule.save_every or schedule.steps,
            "prediction_loss_only": True,
        }

    def trainer(self, args: TrainingArguments, **more: Any) -> Trainer:
        """Transformers' own, on packed sequences."""
        return Trainer(
            model=self.model,
            args=args,
            train_dataset=self.text.train,
            eval_dataset=self.text.held_out,
            data_collator=packing.collate,
            processing_class=self.tokenizer,
            **more,
        )

    def scores(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """The perplexity."""
        return {"perplexity": records.perplexity(metrics["eval_loss"])}

    def figures(self, scores: dict[str, Any]) -> dict[str, Any]:
        """The perplexity of the last evaluation."""
        return {"perplexity": scores.get("perplexity")}
