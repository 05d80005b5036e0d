"""GLUE's tasks by name: columns, the split that is held out, and metrics (arXiv 1804.07461)."""

from dataclasses import dataclass
from typing import Literal, get_args

TaskName = Literal[
    "cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "classify", "sft", "dpo", "reward", "grpo"
]
"""What ``--task`` takes: a task of GLUE, rows of one's own with labels, or a stage of TRL's."""

ON_TRL = ("sft", "dpo", "reward", "grpo")
"""Those that a trainer of TRL does."""

ARITHMETIC = "arithmetic"
"""The name of data that are made on the spot, for grpo: sums with their answers."""

TASKS: tuple[str, ...] = get_args(TaskName)


@dataclass(frozen=True)
class Task:
    """One task."""

    columns: tuple[str, ...]  # the text's, and its pair's if there are two
    metrics: tuple[str, ...]  # of `galore_torch.training.finetune.scores.METRICS`, the main one first
    held_out: str = "validation"  # the split that is judged
    numbers: bool = False  # whether labels are numbers to be met, not classes


_PAIR = ("sentence1", "sentence2")
GLUE: dict[str, Task] = {
    "cola": Task(("sentence",), ("matthews", "accuracy")),
    "sst2": Task(("sentence",), ("accuracy",)),
    "mrpc": Task(_PAIR, ("f1", "accuracy")),
    "stsb": Task(_PAIR, ("pearson", "spearman"), numbers=True),
    "qqp": Task(("question1", "question2"), ("accuracy", "f1")),
    "mnli": Task(("premise", "hypothesis"), ("accuracy",), "validation_matched"),
    "qnli": Task(("question", "sentence"), ("accuracy",)),
    "rte": Task(_PAIR, ("accuracy",)),
    "wnli": Task(_PAIR, ("accuracy",)),
}
"""Every task by the name that ``--task`` takes."""
