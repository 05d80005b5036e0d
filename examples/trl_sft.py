"""Fine-tune with TRL's SFTTrainer and gradients that are never formed: a small Mistral learns to document functions.

    pip install ".[train]"  # in the folder of galore-torch 2
    python examples/trl_sft.py

Nothing is downloaded: prompts are the standard library's function signatures, completions the first lines of their
docstrings, and the tokenizer is trained on the spot. For a real model give its name as `model`.
"""

from __future__ import annotations

import ast
import sysconfig
import tempfile
from pathlib import Path

import datasets
import tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from galore_torch.integrations.transformers import GaLoreFactory


def documented_functions(files: int) -> datasets.Dataset:
    """Signatures as prompts and what the docstrings say first as completions, of this many modules."""
    rows = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)):
                signature = f"def {node.name}({ast.unparse(node.args)}):\n"
                rows.append({"prompt": signature, "completion": docstring.partition("\n")[0]})
    return datasets.Dataset.from_list(rows)


def train_tokenizer(rows: datasets.Dataset, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with this many entries."""
    trained = tokenizers.ByteLevelBPETokenizer()
    texts = [text for column in ("prompt", "completion") for text in rows[column]]
    trained.train_from_iterator(texts, vocabulary, special_tokens=["<pad>", "<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, pad_token="<pad>", eos_token="<eos>")


def main() -> None:
    """Trains for 60 steps; half a minute on two cores."""
    rows = documented_functions(files=60)
    tokenizer = train_tokenizer(rows, vocabulary=1000)
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model("mistral", vocab_size=len(tokenizer), num_key_value_heads=2, **sizes, **ids)
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(prefix="galore-example-"),
        max_steps=60,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,  # projected gradients accumulate, r x n in place of m x n
        max_length=128,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        bf16=False,  # SFTConfig's default wants a GPU
    )
    galore = {"rank": 32, "lr": 1e-2, "update_proj_gap": 20, "gradients": "fused"}
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_config(config),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(GaLoreFactory, galore),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")


if __name__ == "__main__":
    main()
