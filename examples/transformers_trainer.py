"""Pre-train a small Mistral with GaLore through TRL's SFTTrainer, which needs to know nothing but two names.

    pip install ".[train]"  # in the folder of galore-torch 2
    python examples/transformers_trainer.py

Nothing is downloaded: the text is the Python standard library's own sources, and the tokenizer is trained on the spot.
"""

from __future__ import annotations

import sysconfig
import tempfile
from pathlib import Path

import datasets
import tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer


def standard_library(files: int) -> datasets.Dataset:
    """Pieces of the sources of this many modules, as rows with a column `text`."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]
    sources = [path.read_text(encoding="utf-8") for path in paths]
    pieces = [source[start : start + 400] for source in sources for start in range(0, len(source), 400)]
    return datasets.Dataset.from_dict({"text": pieces})


def train_tokenizer(texts: datasets.Dataset, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with this many entries."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(texts["text"], vocabulary, special_tokens=["<pad>", "<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, pad_token="<pad>", eos_token="<eos>")


def main() -> None:
    """Trains for 40 steps; a quarter of a minute on two cores."""
    train_dataset = standard_library(files=10)
    tokenizer = train_tokenizer(train_dataset, vocabulary=1000)
    config = AutoConfig.for_model(
        "mistral",
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(prefix="galore-example-"),
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        max_length=128,
        optim="galore_adamw",  # or galore_adamw_8bit, galore_adafactor, each also with _layerwise
        optim_target_modules=["attn", "mlp"],
        optim_args="rank=32,update_proj_gap=20,scale=0.25,proj_type=std",
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        bf16=False,  # SFTConfig's default wants a GPU
    )
    model = AutoModelForCausalLM.from_config(config)
    trainer = SFTTrainer(model=model, args=args, train_dataset=train_dataset, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")


if __name__ == "__main__":
    main()
