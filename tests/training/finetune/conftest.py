"""Small models with tokenizers and rows of real text: an encoder and a causal model, and docstrings to learn from."""

import csv
import functools
import inspect
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from galore_torch.training.finetune.presets import configure
from galore_torch.training.run import records

CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ message['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|endoftext|>")
POSITIONS, VOCABULARY = 64, 400


@functools.cache
def sentences() -> tuple[tuple[str, str], ...]:
    """Return lines of code with the module that they stand in: two kinds that can be told apart."""
    found = []
    for name in ("calendar", "heapq"):
        lines = [line.strip() for line in inspect.getsource(__import__(name)).splitlines()]
        found.append([(line, name) for line in lines if 25 < len(line) < 70][:70])
    return tuple(row for pair in zip(*found, strict=True) for row in pair)


@functools.cache
def _tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator((text for text, _ in sentences()), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT that was trained for something else: its head must be made anew."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=POSITIONS, pad_token_id=0,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA with a chat template that marks its answers."""
    folder = tmp_path_factory.mktemp("causal")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path: Path):
    """Write rows, each a dict, as CSV or JSON lines by the name's ending, and return the path as text."""

    def to(name: str, rows: list[dict]) -> str:
        path = tmp_path / name
        if path.suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return to


@pytest.fixture
def labelled(write) -> str:
    """A CSV file of lines of code with the modules they are from."""
    return write("rows.csv", [{"text": text, "label": label} for text, label in sentences()])


@pytest.fixture
def asked(write) -> str:
    """JSON lines of prompts with completions."""
    return write("asked.jsonl", [{"prompt": text + "\n", "completion": name} for text, name in sentences()[:48]])


@pytest.fixture
def classify(encoder, labelled):
    """Make the configuration of a short classification, any setting overridden."""

    def make(**given):
        settings = {
            "data": labelled, "model": str(encoder), "max_length": 32, "steps": 8, "batch": 8, "lr": 1e-2,
            "eval_every": 4,
        }  # fmt: skip
        return configure(**{**settings, **given})

    return make


@pytest.fixture
def supervise(causal, asked):
    """Make the configuration of a short supervised fine-tuning, any setting overridden."""

    def make(**given):
        settings = {
            "task": "sft", "data": asked, "model": str(causal), "max_length": 64, "steps": 8, "batch": 8, "lr": 1e-2,
            "answers": 2, "answer_tokens": 4,
        }  # fmt: skip
        return configure(**{**settings, **given})

    return make


def losses(folder: Path) -> list[float]:
    """Return the losses of a run's steps."""
    return [record["loss"] for record in records.read(folder / "metrics.jsonl") if "loss" in record]
