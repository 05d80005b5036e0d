"""What the fine-tunings on TRL's trainers have in common: columns, model, chat template, trainer and answers."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, ClassVar

import trl
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments

from galore_torch.training.finetune.config import FinetuneConfig
from galore_torch.training.finetune.data import Rows, require_texts
from galore_torch.training.run.base_model import load_base
from galore_torch.training.text.rows import in_rows, missing_column
from galore_torch.units import sentence


class OnTRL:
    """One kind of fine-tuning by a trainer of TRL; a subclass says by which, and what is scored.

    Attributes:
        task_type: PEFT's name of what the model is trained for.
        trainer_name: of the trainer in TRL, which has a configuration of the same name.
        forms: columns of which it takes the first that rows have; those are ``columns``.
        repeats: how many of a batch are of the same row.
    """

    task_type = "CAUSAL_LM"
    trainer_name: ClassVar[str]
    forms: tuple[tuple[str, ...], ...]
    model_class: ClassVar[Any] = AutoModelForCausalLM
    model_settings: ClassVar[dict[str, Any]] = {}
    repeats = 1

    def __init__(self, config: FinetuneConfig, rows: Rows, console: Console) -> None:
        self.data = config.data
        self.columns = _first_form(rows, self.forms)
        for column in self.columns:
            _require(rows, column)
        self.train, self.held_out = (part.select_columns(list(self.columns)) for part, _ in rows.parts)
        self._rows = rows.held_out_rows
        self.model, self.tokenizer = load_base(
            config.model, self.model_class, self.data.max_length, console, **self.model_settings
        )
        self.model.config.use_cache = False
        if self.data.chat_template is not None:
            self.tokenizer.chat_template = _template(self.data.chat_template)
        if self.is_chat and self.tokenizer.chat_template is None:
            raise ValueError(
                f"model = {config.model.model!r} has no chat template for messages; give one as --chat-template FILE, "
                "or give prompt and completion as text."
            )

    @property
    def is_chat(self) -> bool:
        """Whether rows are messages."""
        return any(isinstance(self.train[0][column], list) for column in self.columns)

    def options(self) -> dict[str, Any]:
        """What the trainer's configuration says besides `TrainingArguments`."""
        return {"max_length": self.data.max_length}

    def more(self) -> dict[str, Any]:
        """What the trainer takes besides."""
        return {}

    def trainer(self, args: TrainingArguments, **more: Any) -> Trainer:
        """Make the trainer."""
        given = {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.init}
        made = getattr(trl, f"{self.trainer_name}Config")(**given | self.options())
        trainer: Trainer = getattr(trl, f"{self.trainer_name}Trainer")(
            model=self.model,
            args=made,
            train_dataset=self.train,
            eval_dataset=self.held_out,
            processing_class=self.tokenizer,
            **self.more() | more,
        )
        return trainer

    def predictions(self, _trainer: Trainer) -> list[dict[str, Any]]:
        """What the model writes, greedily, after the first held-out prompts, of as many as the settings say."""
        self.model.eval()
        rows = self.held_out.select(range(min(self.data.answers, len(self.held_out))))
        return [
            {"row": number, "input": prompt, "expected": self.expected(row), "prediction": self.answered(prompt)}
            for number, row in zip(self._rows, rows, strict=False)
            for prompt in (self.prompt(row),)
        ]

    def prompt(self, row: Any) -> str:
        """What is asked in a row, with all but the answer."""
        first = row[self.columns[0]]
        if not isinstance(first, list):
            return str(first)
        asked = first[:-1] if len(self.columns) == 1 and len(first) > 1 else first
        return str(self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))

    def expected(self, row: Any) -> Any:
        """What is to be answered; None where nothing is."""
        last = row[self.columns[-1]]
        if isinstance(last, list):
            return last[-1]["content"]
        return last if len(self.columns) > 1 else None

    def answered(self, prompt: str) -> str:
        """What the model writes after a prompt."""
        asked = self.tokenizer(prompt, return_tensors="pt", truncation=True, max_length=self.data.max_length)
        known = {name: asked[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        out = self.model.generate(**known, max_new_tokens=self.data.answer_tokens, do_sample=False)
        return str(self.tokenizer.decode(out[0, known["input_ids"].shape[1] :], skip_special_tokens=True))


def _first_form(rows: Rows, forms: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """The first of some forms that rows have; a ValueError says that they have none."""
    known = set(rows.train.column_names) & set(rows.held_out.column_names)
    for form in forms:
        if set(form) <= known:
            return form
    raise missing_column("text_column", " or ".join(map(", ".join, forms)), rows.train.column_names)


def _require(rows: Rows, column: str) -> None:
    if not isinstance(rows.train[0][column], list):
        require_texts(rows, "text_column", column)
        return
    wrong = [
        number
        for part, numbers in rows.parts
        for number, messages in zip(numbers, part[column], strict=True)
        if not messages or not all(isinstance(one, dict) and one.get("role") and one.get("content") for one in messages)
    ]
    if wrong:
        raise ValueError(f"{column} in {in_rows(sorted(wrong))} is no list of messages with role and content; mend it.")


def _template(name: str) -> str:
    """The chat template in a file, or that of another model's tokenizer."""
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"chat_template = {name!r} is no file, and no model that has one: {sentence(error)} Give one of them."
        ) from error
    if not isinstance(tokenizer.chat_template, str):
        raise ValueError(f"chat_template = {name!r} has a tokenizer without a chat template; give another.")
    return tokenizer.chat_template


def marks_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template marks what the assistant says, or TRL knows one like it that does."""
    from trl.chat_template_utils import get_training_chat_template

    if re.search(r"{%-?\s*generation", str(tokenizer.chat_template)):
        return True
    try:
        get_training_chat_template(tokenizer)
    except ValueError:
        return False
    return True
