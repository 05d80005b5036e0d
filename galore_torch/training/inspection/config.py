"""The settings of an inspection: its steps and snapshots, the rule of its recommendations, and the data of a model."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from galore_torch.training.finetune import presets
from galore_torch.training.finetune.config import TASKS, FinetuneConfig, TaskName
from galore_torch.training.pretrain.config import PretrainConfig
from galore_torch.training.settings.config import from_values, sections_of
from galore_torch.training.settings.fields import DType, field_names, require_defaults, setting, settings
from galore_torch.units import parse_bytes

PLAIN_TEXT = "text"  # the task of a causal model on packed text, as in pre-training
FULL_GRADIENTS: dict[str, Any] = {"gradients": "full", "update": "step", "save_inputs": "projected"}
_TEXT_LENGTH = 256  # as the paper's sequences


@settings
class SnapshotConfig:
    """Which steps are made, and of which of their gradients snapshots are taken."""

    steps: int = setting(60, "Optimizer steps that are made, on a copy of the model that is then dropped.", ge=2)
    every: int = setting(5, "Steps between two snapshots of the gradients.", ge=1)
    oldest: int | None = setting(
        None,
        "Age up to which a basis is judged by later gradients, in steps: a multiple of every. A basis of every weight "
        "is kept for each snapshot in between.",
        ge=1,
        default_help="two snapshots less than steps",
    )
    rank: int | None = setting(None, "Rank of the bases that figures are about.", ge=1, default_help="the recipe's")
    lr: float | None = setting(
        None,
        "Learning rate of the steps.",
        gt=0,
        default_help="the run's newest, at least a tenth of its peak; 0.0001 of --model",
    )
    target_modules: str | None = setting(
        None,
        "Modules to inspect: parts of their names by comma, or all-linear.",
        default_help="those that are projected",
    )

    def __post_init__(self) -> None:
        if self.steps < 2 * self.every:
            raise ValueError(
                f"steps = {self.steps} gives {self.count} snapshots at every = {self.every}, and one basis "
                f"is to be judged by another gradient; give at least {2 * self.every}."
            )
        if self.oldest is not None and self.oldest not in range(self.every, self.last, self.every):
            raise ValueError(
                f"oldest = {self.oldest}, and in steps = {self.steps} bases are judged at ages that are multiples of "
                f"every = {self.every}; give one of them up to {self.last - self.every}, or more steps."
            )

    @property
    def count(self) -> int:
        """How many snapshots there are."""
        return self.steps // self.every

    @property
    def last(self) -> int:
        """The step of the last one."""
        return self.count * self.every

    @property
    def ages(self) -> tuple[int, ...]:
        """The ages of bases that are judged, in steps. Each is met twice at least, where there are three snapshots."""
        oldest = self.oldest or max(1, self.count - 2) * self.every
        return tuple(range(self.every, oldest + 1, self.every))


@settings
class RecommendConfig:
    """By which rule a rank and a gap are recommended; see `galore_torch.training.inspection.figures`."""

    capture_share: float = setting(
        0.6, "Share of the next snapshot's gradient that a basis of the recommended rank must capture.", gt=0, lt=1
    )
    keep_share: float = setting(
        0.9, "Share of what young bases capture that one must still capture after the recommended gap.", gt=0, lt=1
    )
    rank_multiple: int = setting(8, "Recommended ranks are multiples of it.", ge=1)
    state_budget: str | None = setting(
        None,
        "Most that bases and moments of all inspected weights may take, such as 200MB, in the weights' dtype: ranks go "
        "where they capture most for their bytes, up to capture_share.",
    )

    def __post_init__(self) -> None:
        if self.state_budget is not None:
            parse_bytes(self.state_budget, "state_budget")


@settings
class ModelDataConfig:
    """The data of a model, and how it is trained on them. What is None is as `galore finetune` has it."""

    task: Literal["text"] | TaskName = setting(
        PLAIN_TEXT,
        f"What the model is trained for: {PLAIN_TEXT} (a causal model on packed text), or one of galore finetune's: "
        f"{', '.join(TASKS)}.",
    )
    dtype: DType | None = setting(None, "What weights are stored in.", default_help="float32")
    gguf_file: str | None = setting(None, "A GGUF file in the model's folder, which holds the weights.")
    max_length: int | None = setting(
        None, "Tokens of a sequence of packed text; most of a row otherwise.", ge=2, default_help="the recipe's"
    )
    batch: int | None = setting(None, "Sequences or rows a step.", ge=1, default_help="the recipe's")
    micro_batch: int | None = setting(None, "Sequences or rows at once; bounds memory.", ge=1, default_help="batch")
    text_column: str | None = setting(None, "Column of the text.", default_help="text")
    text_pair_column: str | None = setting(None, "Column of a second text, for pairs.")
    label_column: str | None = setting(None, "Column of the label.", default_help="label")
    labels: Literal["auto", "classes", "numbers"] | None = setting(None, "What labels are.", default_help="auto")
    seed: int | None = setting(None, "Seed of a fresh head and of the order of the data.", ge=0, default_help="0")
    cache: str | None = setting(
        None, "Folder for tokenized text.", default_help="$GALORE_CACHE or ~/.cache/galore-torch"
    )

    def __post_init__(self) -> None:
        of_rows = dict.fromkeys(("text_pair_column", "label_column", "labels"), ("classify",))
        require_defaults(self, "task", {**of_rows, "cache": (PLAIN_TEXT,)})


@settings
class InspectConfig:
    """All settings of an inspection."""

    snapshots: SnapshotConfig
    recommendation: RecommendConfig
    data: ModelDataConfig

    doing: ClassVar[str] = "an inspection"


def configure(**given: Any) -> InspectConfig:
    """Settings by name, what is None not being given; a ValueError says which is unknown or not allowed.

    >>> configure(steps=20, every=4).snapshots.ages
    (4, 8, 12)
    """
    return from_values(InspectConfig, {name: value for name, value in given.items() if value is not None})


def recipe_of(model: str, data: str | None, config: InspectConfig) -> FinetuneConfig | PretrainConfig:
    """How a model is trained while it is inspected; the arguments are those of `jobs.job_of_model`."""
    given = {name: value for name, value in dataclasses.asdict(config.data).items() if value is not None}
    task, cache, snapshots = given.pop("task"), given.pop("cache", None), config.snapshots
    is_text = task == PLAIN_TEXT
    given |= {"task": "sft", "max_length": given.get("max_length", _TEXT_LENGTH)} if is_text else {"task": task}
    own = {name: getattr(snapshots, name) for name in ("rank", "lr", "steps")}
    recipe = presets.configure(model=model, data=data, **own, **FULL_GRADIENTS, **given)
    return _on_text(recipe, cache) if is_text else recipe


def _on_text(recipe: FinetuneConfig, cache: str | None) -> PretrainConfig:
    """The settings of a recipe for rows, for packed text."""
    known = field_names(*sections_of(PretrainConfig).values())
    length, sections = recipe.data.max_length, dataclasses.asdict(recipe).values()
    given = {name: value for section in sections for name, value in section.items() if name in known}
    given |= {"micro_batch": recipe.micro_batch, "seq": length, "eval_tokens": length, "cache": cache}
    return from_values(PretrainConfig, {name: value for name, value in given.items() if value is not None})
