"""Learning from the rewards of a rule, which compares the end of an answer with the right one: GRPO (2402.03300)."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console

from galore_torch.training.finetune.config import FinetuneConfig
from galore_torch.training.finetune.data import Rows
from galore_torch.training.finetune.on_trl import OnTRL


def rewards(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """The reward of each completion: 1 if the last number in it is the answer, or, of a text, if it ends by it.

    Args:
        completions: texts, or lists of messages.
        answer: the right one for each.

    >>> rewards(["it is 12", "12 or 13", "Paris."], answer=["12", "12", "paris"])
    [1.0, 0.0, 1.0]
    """
    return [float(_is_right(_text(said), str(right))) for said, right in zip(completions, answer, strict=True)]


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _is_right(said: str, right: str) -> bool:
    if re.fullmatch(r"-?\d+(\.\d+)?", right.strip()):
        numbers = re.findall(r"-?\d+(?:\.\d+)?", said.replace(",", ""))
        return bool(numbers) and float(numbers[-1]) == float(right)
    return said.strip().rstrip(".").lower().endswith(right.strip().rstrip(".").lower())


class Reasoning(OnTRL):
    """Group relative policy optimization of a causal model on TRL's GRPOTrainer."""

    trainer_name = "GRPO"
    forms = (("prompt", "answer"),)

    def __init__(self, config: FinetuneConfig, rows: Rows, console: Console) -> None:
        super().__init__(config, rows, console)
        self.repeats = self.data.generations

    def options(self) -> dict[str, Any]:
        """How many answers a prompt gets, and how long they are; for an evaluation it gets one."""
        return {
            "num_generations": self.data.generations,
            "num_generations_eval": 1,
            "max_completion_length": self.data.answer_tokens,
            "remove_unused_columns": False,  # the rule reads the answers
        }

    def more(self) -> dict[str, Any]:
        """The rule."""
        return {"reward_funcs": rewards}

    def scores(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """The mean reward: the share of right answers."""
        return {"reward": metrics["eval_reward"]}
