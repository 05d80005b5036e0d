"""The subject of a model with data: packed text as in pre-training, or rows as in fine-tuning."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from rich.console import Console
from transformers import AutoModelForCausalLM, Trainer, set_seed

from galore_torch.training.finetune import presets
from galore_torch.training.finetune.base_model import load_base
from galore_torch.training.finetune.classification import Classification
from galore_torch.training.finetune.config import FinetuneConfig
from galore_torch.training.finetune.data import Rows, load
from galore_torch.training.finetune.supervised import Supervised
from galore_torch.training.inspection.config import PLAIN_TEXT, InspectConfig
from galore_torch.training.inspection.subject import Subject, whole
from galore_torch.training.run.progress import quiet
from galore_torch.training.text import packing
from galore_torch.training.text.config import DataConfig
from galore_torch.training.text.prepare import prepare_text

_TEXT_LENGTH = 256  # as the paper's sequences


def recipe_of(model: str, data: str | None, config: InspectConfig) -> FinetuneConfig:
    """How a model would be fine-tuned on data: `galore finetune`'s recipe for the task.

    Args:
        model: name or folder.
        data: file or folder; None for a task that brings its own.
        config: the inspection's settings.

    Raises:
        ValueError: when settings do not fit together.
    """
    own = config.data
    given = dict(own.given)
    task = "sft" if own.task == PLAIN_TEXT else own.task
    if own.task == PLAIN_TEXT:
        given.setdefault("max_length", _TEXT_LENGTH)
    looks = config.looks
    asked: dict[str, Any] = {
        "rank": looks.rank,
        "lr": looks.lr,
        "steps": looks.steps,
        "warmup": 0.0,
        "decay": "constant",
    }
    recipe = presets.configure(model=model, data=data, task=task, **asked, **given)
    return dataclasses.replace(recipe, optimizer=whole(recipe.optimizer))


def subject_of_model(recipe: FinetuneConfig, config: InspectConfig, console: Console) -> Subject:
    """Load a model and its data.

    Args:
        recipe: see `recipe_of`.
        config: the inspection's settings.
        console: where progress is shown.

    Raises:
        ValueError: when they cannot be loaded or do not fit.
    """
    quiet(console)
    set_seed(recipe.schedule.seed)
    if config.data.task == PLAIN_TEXT:
        return _of_text(recipe, config.data.cache, console)
    return tuned(recipe, load(recipe.data), console)


def tuned(recipe: FinetuneConfig, rows: Rows, console: Console) -> Subject:
    """The subject of a fine-tuning.

    Args:
        recipe: all of its settings.
        rows: its own.
        console: where progress is shown.

    Raises:
        ValueError: when the model cannot be loaded or does not fit the rows.
    """
    set_seed(recipe.schedule.seed)
    kind = (Supervised if recipe.data.task == "sft" else Classification)(recipe, rows, console)
    return _subject(recipe, kind.model, kind.trainer)


def _of_text(recipe: FinetuneConfig, cache: str | None, console: Console) -> Subject:
    length = recipe.data.max_length
    model, tokenizer = load_base(recipe.model, AutoModelForCausalLM, length, console)
    model.config.use_cache = False
    text = prepare_text(
        DataConfig(
            data=recipe.data.data,
            tokenizer=recipe.model.model,
            text_column=recipe.data.text_column,
            seq=length,
            eval_tokens=length,
            cache=cache,
        ),
        console,
        batch=recipe.schedule.batch,
        seed=recipe.schedule.seed,
    )
    trainer = partial(
        Trainer, model=model, train_dataset=text.train, data_collator=packing.collate, processing_class=tokenizer
    )
    return _subject(recipe, model, trainer)


def _subject(recipe: FinetuneConfig, model: Any, make_trainer: Any) -> Subject:
    schedule = recipe.schedule
    return Subject(
        title=f"{recipe.model.model} on {recipe.data.data or recipe.data.task}",
        model=model,
        make_trainer=make_trainer,
        arguments={
            "max_steps": schedule.steps or -1,
            "num_train_epochs": schedule.epochs,
            "per_device_train_batch_size": recipe.micro_batch,
            "gradient_accumulation_steps": schedule.batch // recipe.micro_batch,
            "learning_rate": recipe.optimizer.lr,
            "lr_scheduler_type": schedule.decay if schedule.decay != "constant" else "constant_with_warmup",
            "warmup_steps": schedule.warmup,  # below 1 it is a share of the steps
            "max_grad_norm": recipe.optimizer.max_grad_norm,
        },
        optimizer=recipe.optimizer,
        targets=recipe.targets,
        seed=schedule.seed,
        rank=recipe.optimizer.rank,
        facts={
            "model": recipe.model.model,
            "data": recipe.data.data or recipe.data.task,
            "optimizer": recipe.optimizer.optim,
            "learning rate": f"constant {recipe.optimizer.lr:g}",
            "sequences or rows a step": schedule.batch,
            "tokens of one, at most": recipe.data.max_length,
        },
    )
