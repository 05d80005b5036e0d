"""Pre-train a causal model, from scratch or from where another training has left it: data, model and schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers import Trainer, TrainingArguments, set_seed

from galore_torch.training.pretrain.config import PretrainConfig
from galore_torch.training.pretrain.model import build_model
from galore_torch.training.run import records
from galore_torch.training.run.base_model import load_tokenizer
from galore_torch.training.run.job import Job, RunResult
from galore_torch.training.settings.optimizer import MATRICES
from galore_torch.training.text import packing


@dataclass(frozen=True, kw_only=True)
class PretrainResult(RunResult):
    """What a pre-training came to."""

    tokens: int  # seen
    vocabulary: int  # entries; a uniform guess among them has that perplexity
    perplexity: float | None  # on the held-out text, at the end; the exponential of `eval_loss`
    tokens_per_second: float  # mean over the training steps, without evaluations and saves

    @property
    def headline(self) -> str:
        """Perplexity and tokens a second."""
        return f"perplexity {self.perplexity:,.2f}  {self.tokens_per_second:,.0f} tok/s"

    @property
    def remarks(self) -> list[str]:
        """That a guess would have been better."""
        if self.perplexity is None or self.perplexity < self.vocabulary:
            return []
        return [f"That is no better than to guess among {self.vocabulary:,} tokens: make more steps, or lower --lr."]


def text_of(config: PretrainConfig, console: Console) -> packing.Text:
    """Read, tokenize and pack the text of a pre-training, by the tokenizer of the model that it goes on from."""
    own = None if config.model.model is None else load_tokenizer(config.model)
    batch, seed = config.schedule.batch, config.schedule.seed
    return packing.prepare_text(config.data, console, batch=batch, seed=seed, tokenizer=own)


class Pretraining(Job):
    """A pre-training of a causal model, a LLaMA with newly initialized weights unless the settings name another.

    Args:
        config: its settings, see `galore_torch.training.pretrain.presets.configure`.
        console: where progress is shown.
    """

    unit = "tokens"
    settings = PretrainConfig
    result = PretrainResult

    def __init__(self, config: PretrainConfig, console: Console) -> None:
        schedule, start = config.schedule, config.model
        self.config, self.data, self.target_modules = config, config.data.data, MATRICES
        self.text = text_of(config, console)
        self.tokenizer, self.digest, self.stream = self.text.tokenizer, self.text.digest, self.text.stream
        set_seed(schedule.seed)
        self.model = build_model(config, self.tokenizer, console)
        if start.model is not None:
            self.task_type = "CAUSAL_LM"
        self.units_per_step = config.tokens_per_step
        passes = schedule.steps * config.tokens_per_step / (self.text.tokens or math.inf)
        called = escape(start.model or start.config_of or "a LLaMA")
        self.announcement = (
            f"[bold]{config.title}[/] on {called} of {self.model.num_parameters():,} parameters; "
            f"{escape(self.data)} ({self.text.amount}); "
            f"{schedule.steps:,} steps of {config.tokens_per_step:,} tokens"
            + (f", {passes:,.1f} passes over the text" if passes > 1 else "")
        )

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
        return {"perplexity": scores.get("perplexity"), "vocabulary": self.model.config.vocab_size}
