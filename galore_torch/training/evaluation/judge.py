"""How a model is judged: by the job that trained it, without a step."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

import datasets
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

from galore_torch.training.finetune.classification import class_names
from galore_torch.training.finetune.config import FinetuneConfig
from galore_torch.training.finetune.data import load
from galore_torch.training.finetune.run import Finetuning
from galore_torch.training.pretrain.config import PretrainConfig
from galore_torch.training.run import records
from galore_torch.training.run.base_model import load_base
from galore_torch.training.run.callbacks import quiet
from galore_torch.training.run.job import make_trainer
from galore_torch.training.text import packing
from galore_torch.training.text.row_checks import missing_column

Judgement = tuple[dict[str, float], list[dict[str, Any]]]


def judge(config: Any, console: Console, *, predicting: bool, others: bool) -> Judgement:
    """A model's scores by name, or what it says of each row.

    Args:
        config: of a pre-training or a fine-tuning, with the model.
        console: where progress is shown.
        predicting: which of the two is wanted; the other is empty.
        others: whether the data are others than those that the model was trained on: then all of them count.
    """
    quiet(console)
    if isinstance(config, FinetuneConfig):
        return _of_rows(config, console, predicting=predicting)
    return _of_text(config, console, whole=others), []  # which has no rows to predict: the settings refuse that


def _of_text(config: PretrainConfig, console: Console, *, whole: bool) -> dict[str, float]:
    model, tokenizer = load_base(config.model, AutoModelForCausalLM, ("seq", config.data.seq), console)
    with packing.corpus_of(config.data, seed=0) as (corpus, files):
        of_all = whole and files is not None
        text = datasets.concatenate_datasets(list(corpus)) if of_all else corpus.held_out
        packed = packing.pack(text, tokenizer, config.data.seq).take(config.data.eval_tokens // config.data.seq)
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            scratch, prediction_loss_only=True, report_to=[], disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(model, args, data_collator=packing.collate, eval_dataset=packed)
        trainer.remove_callback(PrinterCallback)
        loss = trainer.evaluate()["eval_loss"]
    return {"loss": loss, "perplexity": records.perplexity(loss)}


def _of_rows(config: FinetuneConfig, console: Console, *, predicting: bool) -> Judgement:
    rows, column, unlabelled = load(config.data), config.data.label_column, False
    if config.data.task == "classify" and column not in rows.held_out.column_names:
        names = class_names(config.model.model)
        if not (predicting and names):
            raise missing_column("label_column", column, rows.held_out.column_names)
        # The job wants labels; what they are has no effect on a prediction.
        parts = [part.add_column(column, [names[0]] * len(part)) for part in (rows.train, rows.held_out)]
        rows, unlabelled = dataclasses.replace(rows, train=parts[0], held_out=parts[1]), True
    job = Finetuning(config, console, rows)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(job, scratch, torch.optim.SGD(job.model.parameters()))
        if not predicting:
            found = trainer.evaluate()
            return {"loss": found["eval_loss"], **job.scores(found)}, []
        lines = job.predictions(trainer)
    return {}, [{key: line[key] for key in line if not (unlabelled and key == "expected")} for line in lines]
