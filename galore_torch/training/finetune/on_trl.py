"""Fine-tunings of causal models on TRL's trainers.

Supervised fine-tuning; DPO (arXiv 2305.18290) and reward models (2203.02155) from pairs of a preferred and a rejected
answer; GRPO (2402.03300) from the rewards of a rule, which compares the end of an answer with the right one.
"""

from __future__ import annotations

import dataclasses
import re
from itertools import chain
from typing import Any, ClassVar

import torch
import trl
from datasets import Value, load_from_disk
from jinja2 import TemplateError
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)
from trl.chat_template_utils import get_training_chat_template

from galore_torch.training.finetune.config import MEASURED, PREFERENCES, FinetuneConfig
from galore_torch.training.finetune.data import Rows, require_texts
from galore_torch.training.run import processes
from galore_torch.training.run.base_model import load_base
from galore_torch.training.run.model_files import no_template
from galore_torch.training.run.names import local_path, refused
from galore_torch.training.text.row_checks import equal_answers, in_rows, require_answers, require_form, tell_rows


class OnTRL:
    """One kind of fine-tuning by a trainer of TRL; a subclass says by which, and what is scored."""

    trainer_name: ClassVar[str]  # in TRL, which has a configuration of the same name
    forms: tuple[tuple[str, ...], ...]  # columns of which it takes the first that rows have; those are `columns`
    answer: ClassVar[int] = -1  # which of those holds what is to be answered
    task_type = "CAUSAL_LM"  # PEFT's name of what the model is trained for
    model_class: ClassVar[Any] = AutoModelForCausalLM
    model_settings: ClassVar[dict[str, Any]] = {}
    guess = None  # accuracy of saying the commonest label always
    cut = 0  # how many rows are longer than a sequence may be

    def __init__(self, config: FinetuneConfig, rows: Rows, console: Console) -> None:
        self.data, self._console, self.measured = config.data, console, MEASURED[config.data.task]
        known = [name for name in rows.train.column_names if name in rows.held_out.column_names]
        require_form(self.data.task, self.data.text_column, known)
        self.columns = next(form for form in self.forms if set(form) <= set(known))
        is_chat = any(column == "messages" or isinstance(rows.train[0][column], list) for column in self.columns)
        parts = [part.select_columns(list(self.columns)) for part in (rows.train, rows.held_out)]
        for column in self.columns:
            if is_chat and column != "answer":
                _require_messages(rows, column)
            else:
                require_texts(rows, "text_column" if column == self.data.text_column else "column", column)
                parts = [part.cast_column(column, Value("string")) for part in parts]  # a CSV file's may be numbers
        if self.data.task in PREFERENCES:
            both = (rows.column("column", name) for name in self.columns[1:])
            equal = equal_answers((number, one, other) for (number, one), (_, other) in zip(*both, strict=True))
            tell_rows(console, equal, "pairs of equal answers, of which nothing is learnt")
        self.train, self.held_out = parts
        self._rows = rows.held_out_rows
        self.model, self.tokenizer = load_base(
            config.model, self.model_class, ("max_length", self.data.max_length), console, **self.model_settings
        )
        self.model.config.use_cache = False
        if self.data.chat_template is not None:
            self.tokenizer.chat_template = _template(self.data.chat_template)
        if is_chat and self.tokenizer.chat_template is None:
            raise no_template(config.model.model)
        if is_chat:
            self._require_rendered(rows)

    def _require_rendered(self, rows: Rows) -> None:
        """Refuse messages that the chat template refuses, as many do roles out of turn, and one that is broken."""
        known = zip((*rows.train_rows, *rows.held_out_rows), chain(self.train, self.held_out), strict=True)
        for number, row in known:
            first, *others = (row[column] for column in self.columns if column != "answer")
            wrong = f"the chat template does not take the messages of row {number}"
            with refused(wrong, "Mend them, or give another --chat-template.", (TemplateError,)):
                for more in others or [[]]:
                    self.tokenizer.apply_chat_template(first + more, tokenize=False)

    def options(self) -> dict[str, Any]:
        """What the trainer's configuration says besides `TrainingArguments`."""
        return {"max_length": self.data.max_length}

    def trainer(self, args: TrainingArguments, **more: Any) -> Trainer:
        """Make the trainer."""
        given = {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.init}
        made = getattr(trl, f"{self.trainer_name}Config")(**given | self.options())
        trainer: Any = getattr(trl, f"{self.trainer_name}Trainer")(args=made, **more)
        kept = len(trainer.train_dataset), len(trainer.eval_dataset)
        if not all(kept):
            raise self._no_answers()
        if not self.data.packing and (left_out := len(self.train) + len(self.held_out) - sum(kept)):
            most = self.data.max_length
            self._console.print(
                f"{left_out:,} rows are too long for max_length = {most}, and left out.", highlight=False
            )
        return trainer  # type: ignore[no-any-return]

    def _no_answers(self) -> ValueError:
        return ValueError(f"max_length = {self.data.max_length} leaves no answers, so long are prompts; give more.")

    def predictions(self, _trainer: Trainer) -> list[dict[str, Any]]:
        """What the model writes, greedily, after the first held-out prompts, of as many as the settings say."""
        self.model.eval()
        rows = self.held_out.select(range(min(self.data.answers, len(self.held_out))))
        prompts = [(self._prompt(row), self._expected(row)) for row in rows]
        return [
            {"row": number, "input": prompt, "expected": expected, "prediction": self._answered(prompt)}
            for number, (prompt, expected) in zip(self._rows, prompts, strict=False)
        ]

    def _prompt(self, row: Any) -> str:
        first = row[self.columns[0]]
        if not isinstance(first, list):
            return str(first)
        asked = first[:-1] if len(self.columns) == 1 and len(first) > 1 else first
        return str(self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))

    def _expected(self, row: Any) -> Any:
        """What is to be answered; None where nothing is."""
        answer = row[self.columns[self.answer]]
        if isinstance(answer, list):
            return answer[-1]["content"]
        return answer if len(self.columns) > 1 else None

    def _answered(self, prompt: str) -> str:
        given = self._encoded(prompt)
        out = self.model.generate(**given, max_new_tokens=self.data.answer_tokens, do_sample=False)
        return str(self.tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True))

    def _encoded(self, text: str) -> dict[str, torch.Tensor]:
        """A text as the model takes it, with a batch dimension of 1."""
        known = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=self.data.max_length)
        return {name: known[name].to(self.model.device) for name in ("input_ids", "attention_mask")}


def _require_messages(rows: Rows, column: str) -> None:
    wrong = [
        number
        for number, messages in rows.column("text_column", column)
        if not (isinstance(messages, list) and messages)
        or not all(isinstance(one, dict) and one.get("role") and one.get("content") for one in messages)
    ]
    if wrong:
        raise ValueError(f"{column} in {in_rows(sorted(wrong))} is no list of messages with role and content; mend it.")


def _template(name: str) -> str:
    """The chat template in a file, or that of another model's tokenizer."""
    path = local_path("chat_template", name)
    if path.is_file():
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        if "messages" not in text:
            raise ValueError(f"chat_template = {name!r} is a file without a template of messages; give another.")
        return text
    wrong = f"chat_template = {name!r} is no file, and no model that has one"
    with refused(wrong, "Give one of them.", (OSError, ValueError, KeyError)):
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    if not isinstance(tokenizer.chat_template, str):
        raise ValueError(f"chat_template = {name!r} has a tokenizer without a chat template; give another.")
    return str(tokenizer.chat_template)


class Supervised(OnTRL):
    """Learning from examples: messages, prompts with completions (texts or messages), or text."""

    trainer_name = "SFT"

    def __init__(self, config: FinetuneConfig, rows: Rows, console: Console) -> None:
        self.forms = (("messages",), ("prompt", "completion"), (config.data.text_column,))
        super().__init__(config, rows, console)
        if self.data.answers_only:
            self._require_marks()
        self.cut = sum(
            len(self._ids(row)) > self.data.max_length for part in (self.train, self.held_out) for row in part
        )

    def _require_marks(self) -> None:
        """Refuse answers alone where nothing says which they are: neither the template, nor TRL's like of it."""
        require_answers(self.columns)
        if re.search(r"{%-?\s*generation", str(self.tokenizer.chat_template)):
            return
        try:
            get_training_chat_template(self.tokenizer)
        except ValueError as error:
            raise ValueError(
                "answers_only = True, and the chat template does not mark answers by {% generation %}; leave it out, "
                "or give prompt and completion."
            ) from error

    def _ids(self, row: Any) -> Any:
        parts = [row[column] for column in self.columns]
        if isinstance(parts[0], list):
            return self.tokenizer.apply_chat_template(list(chain(*parts)), tokenize=True, return_dict=False)
        return self.tokenizer("".join(parts))["input_ids"]

    def options(self) -> dict[str, Any]:
        """What counts for the loss, and whether rows share a sequence."""
        return {
            **super().options(),
            "dataset_text_field": self.columns[-1],
            "completion_only_loss": True if "completion" in self.columns else None,
            "assistant_only_loss": self.data.answers_only,
            "packing": self.data.packing,
            "eval_packing": False,
        }


class Preferences(OnTRL):
    """Direct preference optimization.

    The reference is the model itself before the first step: its log-probabilities are computed then, and kept.
    Scores are how often the preferred answer has become likelier than the other, and by how much.
    """

    trainer_name = "DPO"
    forms = (("prompt", "chosen", "rejected"),)
    answer = 1

    def options(self) -> dict[str, Any]:
        """How far the model may go from the reference, and that the reference is not kept."""
        return {**super().options(), "beta": self.data.beta, "precompute_ref_log_probs": True}

    def trainer(self, args: TrainingArguments, **more: Any) -> Trainer:
        """Make the trainer; of several processes one writes the reference's log-probabilities, beside rows in files."""
        for part in (self.train, self.held_out):  # of no rows TRL would compute them, too
            if all(len(self.tokenizer(self._prompt(row))["input_ids"]) >= self.data.max_length for row in part):
                raise self._no_answers()
        if processes.count() > 1:
            for name in ("train_dataset", "eval_dataset"):
                path = f"{args.output_dir}/{name}"
                if processes.is_first():
                    more[name].save_to_disk(path)
                processes.wait_for_all()
                more[name] = load_from_disk(path)
        return super().trainer(args, **more)


class Reward(OnTRL):
    """A model with one number for a text, greater for the preferred of two: scores are how often, and by how much."""

    task_type = "SEQ_CLS"
    trainer_name = "Reward"
    forms = Preferences.forms
    model_class = AutoModelForSequenceClassification
    model_settings: ClassVar[dict[str, Any]] = {"num_labels": 1}

    @torch.no_grad()
    def predictions(self, _trainer: Trainer) -> list[dict[str, Any]]:
        """The rewards of both answers of each held-out row."""
        self.model.eval()
        return [
            {"row": number, **row, **{f"reward_{name}": self._reward(row, name) for name in self.columns[1:]}}
            for number, row in zip(self._rows, self.held_out, strict=True)
        ]

    def _reward(self, row: Any, name: str) -> float:
        whole = row["prompt"] + row[name]
        if isinstance(whole, list):
            whole = self.tokenizer.apply_chat_template(whole, tokenize=False)
        return float(self.model(**self._encoded(whole)).logits[0, 0])


class Reasoning(OnTRL):
    """Group relative policy optimization; scored by the mean reward, the share of right answers."""

    trainer_name = "GRPO"
    forms = (("prompt", "answer"),)

    def options(self) -> dict[str, Any]:
        """How many answers a prompt gets, and how long they are; for an evaluation it gets one."""
        return {
            "num_generations": self.data.generations,
            "num_generations_eval": 1,
            "max_completion_length": self.data.answer_tokens,
            "remove_unused_columns": False,  # the rule reads the answers
        }

    def trainer(self, args: TrainingArguments, **more: Any) -> Trainer:
        """Make the trainer, with the rule."""
        return super().trainer(args, reward_funcs=rewards, **more)


def rewards(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """The reward of each completion: 1 if the last number in it is the answer, or, of a text, if it ends by it.

    Args:
        completions: texts, or lists of messages.
        answer: the right one for each.

    >>> rewards(["it is 12", "12 or 13", "Paris."], answer=["12", "12", "paris"])
    [1.0, 0.0, 1.0]
    """
    texts = [said if isinstance(said, str) else str(said[-1]["content"]) for said in completions]
    return [float(_is_right(said, str(right))) for said, right in zip(texts, answer, strict=True)]


def _is_right(said: str, right: str) -> bool:
    if re.fullmatch(r"-?\d+(\.\d+)?", right.strip()):
        numbers = re.findall(r"-?\d+(?:\.\d+)?", said.replace(",", ""))
        return bool(numbers) and float(numbers[-1]) == float(right)
    return said.strip().rstrip(".").lower().endswith(right.strip().rstrip(".").lower())


STAGES: dict[str, type[OnTRL]] = {"sft": Supervised, "dpo": Preferences, "reward": Reward, "grpo": Reasoning}
"""Each by the name that ``--task`` takes."""
