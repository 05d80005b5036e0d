"""Learning from pairs of a preferred and a rejected answer: DPO (arXiv 2305.18290), and reward models (2203.02155)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import AutoModelForSequenceClassification, Trainer

from galore_torch.training.finetune.on_trl import OnTRL

_PAIR = ("chosen", "rejected")


class Preferences(OnTRL):
    """Direct preference optimization of a causal model on TRL's DPOTrainer.

    The reference is the model itself before the first step: its log-probabilities are computed then, and kept.
    """

    trainer_name = "DPO"
    forms = (("prompt", *_PAIR),)

    def options(self) -> dict[str, Any]:
        """How far the model may go from the reference, and that the reference is not kept."""
        return {**super().options(), "beta": self.data.beta, "precompute_ref_log_probs": True}

    def scores(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """How often the preferred answer has become likelier than the other, and by how much."""
        return {"accuracy": metrics["eval_rewards/accuracies"], "margin": metrics["eval_rewards/margins"]}

    def expected(self, row: Any) -> Any:
        """The preferred answer."""
        chosen = row["chosen"]
        return chosen[-1]["content"] if isinstance(chosen, list) else chosen


class Reward(OnTRL):
    """A model with one number for a text, greater for the preferred of two, on TRL's RewardTrainer."""

    task_type = "SEQ_CLS"
    trainer_name = "Reward"
    forms = (("prompt", *_PAIR),)
    model_class = AutoModelForSequenceClassification
    model_settings: ClassVar[dict[str, Any]] = {"num_labels": 1}

    def scores(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """How often the preferred answer has the greater reward, and by how much."""
        return {"accuracy": metrics["eval_accuracy"], "margin": metrics["eval_margin"]}

    @torch.no_grad()
    def predictions(self, _trainer: Trainer) -> list[dict[str, Any]]:
        """The rewards of both answers of each held-out row."""
        self.model.eval()
        return [
            {"row": number, **{name: row[name] for name in self.columns}, **self._rewards(row)}
            for number, row in zip(self._rows, self.held_out, strict=True)
        ]

    def _rewards(self, row: Any) -> dict[str, float]:
        return {f"reward_{name}": self._reward(row, row[name]) for name in _PAIR}

    def _reward(self, row: Any, answer: Any) -> float:
        whole = row["prompt"] + answer
        if isinstance(whole, list):
            whole = self.tokenizer.apply_chat_template(whole, tokenize=False)
        known = self.tokenizer(whole, return_tensors="pt", truncation=True, max_length=self.data.max_length)
        given = {name: known[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        return float(self.model(**given).logits[0, 0])
