"""The settings of a fine-tuning, and its tasks. Sections of optimizer and adapters are those of a pre-training."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from galore_torch.training.run.model_files import (
    json_of,
    require_causal,
    require_length,
    require_template,
    require_weights,
)
from galore_torch.training.run.names import (
    is_written_as_path,
    local_path,
    model_of_run,
    require_model,
    require_on_hub,
)
from galore_torch.training.settings.config import TrainConfig
from galore_torch.training.settings.fields import DType, Purpose, RunConfig, require_defaults, setting, settings
from galore_torch.training.settings.optimizer import MATRICES, modules_named
from galore_torch.training.text import row_checks
from galore_torch.training.text import rows as files_of_rows

TaskName = Literal[
    "cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "classify", "sft", "dpo", "reward", "grpo"
]
"""What ``--task`` takes: a task of GLUE, rows of one's own with labels, or a stage of TRL's."""

ON_TRL = ("sft", "dpo", "reward", "grpo")
"""Those that a trainer of TRL does."""

WRITING = ("sft", "dpo", "grpo")
"""Those of a causal model."""

PREFERENCES = ("dpo", "reward")
"""Those of pairs of answers."""

ARITHMETIC = "arithmetic"
"""The name of data that are made on the spot, for grpo: sums with their answers."""

TASKS: tuple[str, ...] = get_args(TaskName)


@dataclass(frozen=True)
class Task:
    """A task of GLUE (arXiv 1804.07461): columns, the split that is held out, and metrics."""

    columns: tuple[str, ...]  # the text's, and its pair's if there are two
    metrics: tuple[str, ...]  # of `galore_torch.training.finetune.classification.METRICS`, the main one first
    held_out: str = "validation"  # the split that is judged
    numbers: bool = False  # whether labels are numbers to be met, not classes


DEFAULT_MODEL = "FacebookAI/roberta-base"

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
"""Every task of GLUE by the name that ``--task`` takes."""

MEASURED: dict[str, dict[str, str]] = {
    "sft": {"perplexity": "eval_loss"},
    "dpo": {"accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"},
    "reward": {"accuracy": "eval_accuracy", "margin": "eval_margin"},
    "grpo": {"reward": "eval_reward"},
}
"""Scores of TRL's stages, the main one first, by the Trainer's metrics that they are."""

OF_LABELS = ("accuracy", "matthews", "f1", "pearson", "spearman")
"""Scores of rows with labels, of which some are of classes, and some of numbers."""


@settings
class BaseModelConfig:
    """What is fine-tuned."""

    model: str = setting(
        DEFAULT_MODEL,
        "Name on the Hugging Face Hub, or folder, of the model, or folder of a run, whose finished model is meant.",
    )
    gguf_file: str | None = setting(None, "A GGUF file in that folder, which holds the weights.")
    dtype: DType = setting("float32", "What weights are stored in.")
    target_modules: str | None = setting(
        None,
        "Which modules are projected or adapted: parts of their names by comma, or all-linear.",
        default_help="the linear layers in the model's numbered layers; not embeddings, pooler and head",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", model_of_run("model", self.model))


_ONLY: dict[str, tuple[str, ...]] = {  # settings that have an effect on some tasks alone
    "held_out_share": ("classify", *ON_TRL),
    "text_column": ("classify", "sft"),
    **dict.fromkeys(("text_pair_column", "label_column", "labels"), ("classify",)),
    **dict.fromkeys(("answers_only", "packing"), ("sft",)),
    **dict.fromkeys(("answers", "answer_tokens"), WRITING),
    "chat_template": ON_TRL,
    "beta": ("dpo",),
    "generations": ("grpo",),
}


@settings
class RowsConfig:
    """The rows that it is fine-tuned on."""

    task: TaskName = setting(
        "classify",
        f"A task of GLUE ({', '.join(GLUE)}), classify (rows of your own with labels), or a stage of a causal model: "
        "sft (messages, prompt and completion, or text; Alpaca's and ShareGPT's rows too), dpo or reward (chosen and "
        "rejected, with or without prompt), grpo (prompt and answer; what ends by the right answer is rewarded).",
    )
    data: str | None = setting(
        None,
        "CSV, TSV, JSON lines or Parquet file of rows, or a data set of the Hugging Face Hub; needed but for GLUE. "
        f"{ARITHMETIC} makes sums for grpo.",
    )
    held_out: str | None = setting(
        None, "File or data set of held-out rows.", default_help="the data set's validation or test split, or a share"
    )
    held_out_share: float = setting(0.1, "Share of the rows held out, if no file is.", gt=0, lt=1)
    text_column: str = setting("text", "Column of the text.")
    text_pair_column: str | None = setting(None, "Column of a second text, for pairs.")
    label_column: str = setting("label", "Column of the label.")
    labels: Literal["auto", "classes", "numbers"] = setting(
        "auto",
        "What labels are: classes, or numbers to be met (regression). auto takes text and whole numbers for classes.",
    )
    max_length: int = setting(512, "Most tokens of a row; longer ones are truncated.", ge=2)
    chat_template: str | None = setting(
        None, "File with a chat template (Jinja), or model whose template is taken.", default_help="the model's own"
    )
    packing: bool = setting(False, "Lay rows end to end in sequences of max_length (sft only).")
    answers_only: bool = setting(False, "Of messages, learn the assistant's alone (sft only).")
    beta: float = setting(0.1, "How much a model is held to where it began (dpo only).", gt=0)
    generations: int = setting(8, "Answers to each prompt, which share a batch (grpo only).", ge=2)
    answers: int = setting(
        8, "Held-out prompts that the model answers, greedily, in predictions.jsonl (not reward).", ge=0
    )
    answer_tokens: int = setting(64, "Most tokens of an answer (not reward).", ge=1)

    def __post_init__(self) -> None:
        if self.task in GLUE and (self.data or self.held_out):
            raise ValueError(
                f"data = {self.data!r}: task = {self.task!r} brings its own; leave it out, or use classify."
            )
        if self.task not in GLUE and not self.data:
            also = f", or {ARITHMETIC}" if self.task == "grpo" else ""
            raise ValueError(f"data = {self.data!r} leaves task = {self.task!r} without rows; give a file{also}.")
        if self.data == ARITHMETIC and self.task != "grpo":
            raise ValueError(f"data = {self.data!r} is made for task = 'grpo'; give rows of your own.")
        if self.task == "classify" and self.label_column in (self.text_column, self.text_pair_column):
            raise ValueError(
                f"label_column = {self.label_column!r} is the column of the text too; give that of the labels."
            )
        require_defaults(self, "task", _ONLY)


@settings
class LengthConfig(RunConfig):
    """How long, what is recorded on the way, and what becomes of the model."""

    epochs: float = setting(3.0, "Passes over the rows.", gt=0)
    steps: int | None = setting(None, "Optimizer steps, in the place of epochs.", ge=1)
    batch: int = setting(16, "Rows a step.", ge=1)
    micro_batch: int | None = setting(None, "Rows at once; bounds memory.", ge=1, default_help="batch")
    bf16: bool = setting(False, "Compute in bfloat16 by autocast; weights keep their dtype.")
    warmup: float = setting(0.0, "Share of the steps over which the learning rate rises from 0.", ge=0, lt=1)
    decay: Literal["linear", "cosine", "constant"] = setting("linear", "How the learning rate falls to 0, if it does.")
    seed: int = setting(0, "Seed of the head, of the order of the rows and of random bases.", ge=0, le=2**32 - 1)
    eval_every: int | None = setting(None, "Steps between two evaluations.", ge=1, default_help="an epoch")
    save_every: int | None = setting(
        None, "Steps between two resumable checkpoints; Ctrl-C saves besides.", ge=1, default_help="an epoch"
    )
    load_best_model_at_end: bool = setting(
        False, "Save at every evaluation, and finish with the weights of the best one in the place of the last ones."
    )
    metric_for_best_model: str | None = setting(
        None, "By which score an evaluation is the best: one that is shown, or loss.", default_help="the first shown"
    )
    early_stopping_patience: int | None = setting(
        None, "Evaluations in a row, none better than the best, after which the training has ended.", ge=1
    )

    def __post_init__(self) -> None:
        of_best = dict.fromkeys(("metric_for_best_model", "early_stopping_patience"), (True,))
        require_defaults(self, "load_best_model_at_end", of_best)
        if self.load_best_model_at_end and self.save_every not in (None, self.eval_every):
            raise ValueError(
                f"save_every = {self.save_every} has no effect with load_best_model_at_end = True, which saves at "
                "every evaluation; leave it out."
            )


@settings
class FinetuneConfig(TrainConfig):
    """All that decides a fine-tuning's outcome."""

    model: BaseModelConfig
    data: RowsConfig
    schedule: LengthConfig

    doing: ClassVar[str] = "a fine-tuning"

    def __post_init__(self) -> None:
        if self.adapter.adapter == "low-rank":
            raise ValueError(
                "adapter = 'low-rank' throws away what a model has learnt; choose lora, or a method without an adapter."
            )
        if self.schedule.batch % self.data.generations and self.data.task == "grpo":
            raise ValueError(
                f"generations = {self.data.generations} does not divide batch = {self.schedule.batch}; give a divisor."
            )
        if self.adapter.adapter == "relora" and (self.adapter.restart_every or self.schedule.steps) is None:
            raise ValueError(
                "restart_every = None leaves open when relora begins again, for epochs have no known length; give it, "
                "or steps, of which it is a quarter."
            )
        task = self.data.task
        self.require_measured(GLUE[task].metrics if task in GLUE else MEASURED.get(task, OF_LABELS))
        super().__post_init__()

    def require_measured(self, names: Iterable[str]) -> None:
        """Refuse, with a ValueError, to choose by a score that is none of those of the held-out rows."""
        best, known = self.schedule.metric_for_best_model, [*names, "loss"]
        if best is not None and best not in known:
            raise ValueError(f"metric_for_best_model = {best!r} is not measured; choose one of {', '.join(known)}.")

    def require_there(self, to: Purpose = "train") -> None:
        """Refuse rows or a model that is not there, and rows without a column or with none in one of the first.

        To predict, rows need no labels; to train, held-out rows that the others have not. Asked before libraries are
        imported.
        """
        super().require_there(to)
        found: dict[str, list[dict[str, Any]]] = {}
        for field in ("data", "held_out"):
            name = getattr(self.data, field)
            if name is not None and name != ARITHMETIC:
                found[field] = rows = _require_rows(self.data, field, name, labelled=to != "predict")
                if field == "data" and to != "predict" and self.data.task == "classify":
                    self._require_labels([row.get(self.data.label_column) for row in rows])
        if to == "train" and len(found.get("held_out", ())) < files_of_rows.ROWS:  # no more are to be read
            row_checks.shared_rows(found.get("data", ()), found.get("held_out", ()))
        template = self.data.chat_template
        if template is not None and not (path := local_path("chat_template", template)).is_file():
            if is_written_as_path(template) and not path.exists():
                raise ValueError(
                    f"chat_template = {template!r} is no file, and no model that has one; give one of them."
                )
            require_model("chat_template", template, "tokenizer_config.json")
        if self.data.task in GLUE:
            require_on_hub("task", "nyu-mll/glue", "dataset")
        first_rows = [rows[0] for rows in found.values() if rows]
        self._require_model(
            template is None and any(row_checks.are_messages(self.data.task, one) for one in first_rows)
        )

    def _require_model(self, needs_template: bool) -> None:
        model, gguf_file = self.model.model, self.model.gguf_file
        require_model("model", model, gguf_file or "config.json")
        require_length("max_length", self.data.max_length, model)
        if self.data.task in WRITING:
            require_causal(model)
        if gguf_file is None:
            require_weights(model, self.target_modules, self.optimizer.ranks)
            if needs_template:
                require_template(model)

    def _require_labels(self, values: list[Any]) -> None:
        """Refuse labels that are all the same, unless there are more to read or the model may know them."""
        labels = [value for value in values if isinstance(value, str | int | float)]
        if 1 < len(labels) < files_of_rows.ROWS and not self._may_know(set(map(str, labels))):
            row_checks.require_two_labels(self.data.label_column, labels)

    def _may_know(self, labels: set[str]) -> bool:
        """Whether the model may have learnt to tell these labels; one that is not here may."""
        known = json_of(self.model.model, "config.json")
        if not known:
            return self.model.model != DEFAULT_MODEL
        return labels <= set(map(str, dict(known.get("id2label") or {}).values()))

    def going_on_from(self, weights: Path) -> "FinetuneConfig":
        """The same from other weights than its own: a model's folder, with its tokenizer."""
        return replace(self, model=replace(self.model, model=str(weights), gguf_file=None))

    @property
    def target_modules(self) -> str | list[str]:
        """Which modules hold the matrices, by the rules of `galore_torch.param_groups`."""
        return MATRICES if self.model.target_modules is None else modules_named(self.model.target_modules)


def _require_rows(config: RowsConfig, field: str, name: str, *, labelled: bool) -> list[dict[str, Any]]:
    """Refuse rows that cannot be used, as far as that is seen at once; the first ones are returned, or none."""
    if files_of_rows.is_hub_name(field, name):
        require_on_hub(field, name, "dataset")
        return []
    files_of_rows.require_rows(field, name)
    rows = list(files_of_rows.first_rows(field, name))
    if config.task in ON_TRL and rows:
        row_checks.require_form(config.task, config.text_column, rows[0])
        if config.answers_only:
            row_checks.require_answers(rows[0])
    if config.task in PREFERENCES and len(rows) < files_of_rows.ROWS:
        row_checks.equal_answers((n, row.get("chosen"), row.get("rejected")) for n, row in enumerate(rows, 1))
    checked = {"text_column": "is empty"} | ({"label_column": "is without a label"} if labelled else {})
    checked |= {"text_pair_column": "is empty"} if config.text_pair_column else {}
    for of_column, what in checked.items() if config.task == "classify" else ():
        column = getattr(config, of_column)
        if rows and column not in rows[0]:
            raise row_checks.missing_column(of_column, column, rows[0])
        row_checks.require_filled(of_column, column, enumerate((row.get(column) for row in rows), 1), what)
    return rows
