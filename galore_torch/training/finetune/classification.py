"""Sequence classification and regression on Transformers' Trainer."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from rich.console import Console
from scipy.special import softmax
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

from galore_torch.training.finetune import scores
from galore_torch.training.finetune.config import FinetuneConfig
from galore_torch.training.finetune.data import Rows, require_texts
from galore_torch.training.finetune.labels import class_names, find_labels
from galore_torch.training.finetune.tasks import GLUE
from galore_torch.training.run.base_model import load_base


class Classification:
    """One kind of fine-tuning: rows with labels, and a model with a head for them."""

    task_type = "SEQ_CLS"  # PEFT's name
    repeats = 1

    def __init__(self, config: FinetuneConfig, rows: Rows, console: Console) -> None:
        data = config.data
        task = GLUE.get(data.task)
        pair = () if data.text_pair_column is None else (data.text_pair_column,)
        columns = task.columns if task else (data.text_column, *pair)
        for field, column in zip(("text_column", "text_pair_column"), columns, strict=False):
            require_texts(rows, field, column)
        self._inputs = [" | ".join(map(str, texts)) for texts in zip(*(rows.held_out[c] for c in columns), strict=True)]
        self._rows = rows.held_out_rows
        self.labels = find_labels(data, rows, class_names(config.model))
        self.model, self.tokenizer = load_base(
            config.model, AutoModelForSequenceClassification, data.max_length, console, **self.labels.head
        )

        tokenizer, wanted, most = self.tokenizer, self.labels, data.max_length  # all that Datasets has to digest

        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            texts = [[str(text) for text in batch[column]] for column in columns]
            whole = tokenizer(*texts)["input_ids"]
            made = tokenizer(*texts, truncation=True, max_length=most)
            labels = [wanted.encoded(label) for label in batch[wanted.column]]
            return {**made, "labels": labels, "cut": [len(ids) > most for ids in whole]}

        def encoded(part: datasets.Dataset) -> datasets.Dataset:
            return part.map(encode, batched=True, remove_columns=part.column_names, desc="Tokenizing")

        made = [encoded(rows.train), encoded(rows.held_out)]
        cut = sum(sum(part["cut"]) for part in made)
        if cut:
            console.print(f"{cut:,} rows are longer than {data.max_length} tokens and are truncated.")
        self.train, self.held_out = [part.remove_columns("cut") for part in made]

    def trainer(self, args: TrainingArguments, **more: Any) -> Trainer:
        """Make the trainer."""
        trainer = Trainer(
            model=self.model,
            args=args,
            train_dataset=self.train,
            eval_dataset=self.held_out,
            data_collator=DataCollatorWithPadding(self.tokenizer),
            processing_class=self.tokenizer,
            compute_metrics=lambda found: scores.score(
                self.labels.metrics, self._said(found.predictions), np.asarray(found.label_ids)
            ),
            **more,
        )
        # Encoders take any keyword and do not heed the number of items: the Trainer would leave the mean over
        # micro-batches to them, and the loss would be as many times too large.
        trainer.model_accepts_loss_kwargs = False
        return trainer

    def scores(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """The scores among the Trainer's metrics."""
        return {name: metrics[f"eval_{name}"] for name in self.labels.metrics}

    def predictions(self, trainer: Trainer) -> list[dict[str, Any]]:
        """What the model says of each held-out row: its number and text, the right label, and how sure it is."""
        found = trainer.predict(self.held_out)
        said, right = self._said(found.predictions).tolist(), np.asarray(found.label_ids).tolist()
        sure = None if self.labels.classes is None else softmax(self._logits(found.predictions), -1).max(-1).tolist()
        return [
            {
                "row": row,
                "input": self._inputs[index],
                "expected": self.labels.decoded(right[index]),
                "prediction": self.labels.decoded(said[index]),
                **({} if sure is None else {"probability": sure[index]}),
            }
            for index, row in enumerate(self._rows)
        ]

    def _logits(self, logits: Any) -> Any:
        return logits[0] if isinstance(logits, tuple) else logits

    def _said(self, logits: Any) -> Any:
        logits = self._logits(logits)
        return logits.reshape(-1) if self.labels.classes is None else logits.argmax(-1)
