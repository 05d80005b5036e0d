"""Supervised fine-tuning of causal models on TRL's SFTTrainer."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from rich.console import Console
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from galore_torch.training.finetune.config import FinetuneConfig
from galore_torch.training.finetune.data import Rows, require_texts
from galore_torch.training.run import records
from galore_torch.training.run.base_model import load_base


class Supervised:
    """One kind of fine-tuning, of a causal model: messages, prompts with completions (texts or messages), or text."""

    task_type = "CAUSAL_LM"  # PEFT's name

    def __init__(self, config: FinetuneConfig, rows: Rows, console: Console) -> None:
        self._data = config.data
        self.columns = _columns(config, rows)
        self.train = rows.train.select_columns(self.columns)
        self.held_out = rows.held_out.select_columns(self.columns)
        for part in (self.train, self.held_out):
            for column in self.columns:
                _require(part, column)
        self.model, self.tokenizer = load_base(config.model, AutoModelForCausalLM, self._data.max_length, console)
        self.model.config.use_cache = False
        self._require_template(config)
        lengths = [len(self._ids(row)) for part in (self.train, self.held_out) for row in part]
        cut = sum(length > self._data.max_length for length in lengths)
        if cut:
            console.print(f"{cut:,} rows are longer than {self._data.max_length} tokens and are truncated.")

    def _require_template(self, config: FinetuneConfig) -> None:
        chats = any(isinstance(self.train[0][column], list) for column in self.columns)
        template = self.tokenizer.chat_template
        if chats and template is None:
            raise ValueError(
                f"model = {config.model.model!r} has no chat template for messages; give prompt and completion as text."
            )
        if not self._data.answers_only:
            return
        if self.columns != ["messages"]:
            raise ValueError(
                "answers_only = True has no effect without messages: completions alone are trained on; leave it out."
            )
        if not re.search(r"{%-?\s*generation", str(template)):
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

    def trainer(self, args: TrainingArguments, **more: Any) -> Trainer:
        """Make the trainer."""
        from trl import SFTConfig, SFTTrainer

        given = {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.init}
        made = SFTConfig(
            **given,
            max_length=self._data.max_length,
            dataset_text_field=self.columns[-1],
            completion_only_loss=True if "completion" in self.columns else None,
            assistant_only_loss=self._data.answers_only,
        )
        trainer: Trainer = SFTTrainer(
            model=self.model,
            args=made,
            train_dataset=self.train,
            eval_dataset=self.held_out,
            processing_class=self.tokenizer,
            **more,
        )
        return trainer

    def scores(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """The perplexity."""
        return {"perplexity": records.perplexity(metrics["eval_loss"])}

    def predictions(self, _trainer: Trainer) -> list[dict[str, Any]]:
        """What the model writes, greedily, after the first held-out prompts, of as many as the settings say."""
        self.model.eval()
        rows = self.held_out.select(range(min(self._data.answers, len(self.held_out))))
        return [self._answered(self._prompt(row)) for row in rows]

    def _prompt(self, row: Any) -> str:
        first = row[self.columns[0]]
        if not isinstance(first, list):
            return str(first)
        asked = first[:-1] if self.columns == ["messages"] and len(first) > 1 else first
        return str(self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))

    def _answered(self, prompt: str) -> dict[str, Any]:
        asked = self.tokenizer(prompt, return_tensors="pt", truncation=True, max_length=self._data.max_length)
        known = {name: asked[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        out = self.model.generate(**known, max_new_tokens=self._data.answer_tokens, do_sample=False)
        new = out[0, known["input_ids"].shape[1] :]
        return {"prompt": prompt, "prediction": self.tokenizer.decode(new, skip_special_tokens=True)}


def _columns(config: FinetuneConfig, rows: Rows) -> list[str]:
    text = config.data.text_column
    for way in (["messages"], ["prompt", "completion"], [text]):
        if all(set(way) <= set(part.column_names) for part in (rows.train, rows.held_out)):
            return way
    raise ValueError(
        f"data = {config.data.data!r} has neither messages, nor prompt and completion, nor text_column = {text!r}, but "
        f"{', '.join(rows.train.column_names)}; name one of them so."
    )


def _require(rows: Any, column: str) -> None:
    if not isinstance(rows[0][column], list):
        require_texts(rows, "text_column", column)
        return
    for number, messages in enumerate(rows[column]):
        whole = messages and all(isinstance(one, dict) and one.get("role") and "content" in one for one in messages)
        if not whole:
            raise ValueError(
                f"{column} of row {number} = {messages!r} is not a list of messages with role and content; fix the row."
            )
