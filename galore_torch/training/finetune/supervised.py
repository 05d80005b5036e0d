"""Supervised fine-tuning of causal models on TRL's SFTTrainer."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from galore_torch.training.finetune.config import FinetuneConfig
from galore_torch.training.finetune.data import Rows
from galore_torch.training.finetune.on_trl import OnTRL, marks_answers
from galore_torch.training.run import records


class Supervised(OnTRL):
    """One kind of fine-tuning, of a causal model: messages, prompts with completions (texts or messages), or text."""

    trainer_name = "SFT"

    def __init__(self, config: FinetuneConfig, rows: Rows, console: Console) -> None:
        self.forms = (("messages",), ("prompt", "completion"), (config.data.text_column,))
        super().__init__(config, rows, console)
        if self.data.answers_only:
            self._require_marks()
        lengths = [len(self._ids(row)) for part in (self.train, self.held_out) for row in part]
        cut = sum(length > self.data.max_length for length in lengths)
        if cut:
            console.print(f"{cut:,} rows are longer than {self.data.max_length} tokens and are truncated.")

    def _require_marks(self) -> None:
        if self.columns != ("messages",):
            raise ValueError(
                "answers_only = True has no effect without messages: completions alone are trained on; leave it out."
            )
        if not marks_answers(self.tokenizer):
            raise ValueError(
                "answers_only = True, and the chat template does not mark answers by {% generation %}; leave it out, "
                "or give prompt and completion."
            )

    def _ids(self, row: Any) -> Any:
        parts = [row[column] for column in self.columns]
        if isinstance(parts[0], list):
            whole = [message for part in parts for message in part]
            return self.tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
        return self.tokenizer("".join(parts))["input_ids"]

    def options(self) -> dict[str, Any]:
        """What counts for the loss, and whether rows share a sequence."""
        return {
            **super().options(),
            "dataset_text_field": self.columns[-1],
            "completion_only_loss": True if "completion" in self.columns else None,
            "assistant_only_loss": self.data.answers_only,
            "packing": self.data.packing,
            "eval_packing": False,
        }

    def scores(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """The perplexity."""
        return {"perplexity": records.perplexity(metrics["eval_loss"])}
