"""Axolotl's calls of Q-GaLore: its class, its keys in the projected group, and Trainer around it."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from galore_torch import QGaLoreAdamW8bit, quantize_weights
from tests.integrations.small_mistral import assert_falls, blocks, mistral

pytestmark = pytest.mark.slow

GROUP = {"rank": 8, "update_proj_gap": 2, "scale": 0.25, "proj_type": "std"}
LAZY = {"cos_threshold": 0.4, "gamma_proj": 2, "queue_size": 5}
KEYS = {
    "four bits": {**GROUP, **LAZY, "quant": True, "quant_n_bit": 4, "quant_group_size": 256},
    "eight bits": {**GROUP, **LAZY, "quant": True, "quant_n_bit": 8, "quant_group_size": 128},
    "not quantized": {**GROUP, **LAZY, "quant": False, "quant_n_bit": 4, "quant_group_size": 256},
}
ADAM = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
STEPS = 10


def optimizer_of(model, keys):
    projected = [weight for name, weight in model.named_parameters() if "_proj" in name]
    chosen = set(map(id, projected))
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    return QGaLoreAdamW8bit([{"params": others}, {"params": projected, **keys}], **ADAM)


def trainer(folder, keys, *, codes=False, **given):
    model = mistral()
    if codes:
        quantize_weights(model)
    optimizer = optimizer_of(model, keys)
    args = TrainingArguments(
        str(folder),
        **{
            "max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no",
            "use_cpu": True, "report_to": "none", "disable_tqdm": True, "lr_scheduler_type": "constant", **given,
        },
    )  # fmt: skip
    return Trainer(model, args, train_dataset=blocks(), optimizers=(optimizer, None))


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.learning
@pytest.mark.parametrize("codes", [False, True], ids=["plain weights", "INT8 weights"])
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_its_keys_train_and_resume_exactly(tmp_path, keys, codes):
    whole = trainer(tmp_path, keys, codes=codes, save_strategy="steps", save_steps=6)
    whole.train()
    history = losses(whole)
    assert_falls(history)
    resumed = trainer(tmp_path / "again", keys, codes=codes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert losses(resumed)[-4:] == history[-4:]


@pytest.mark.parametrize(("name", "dtype"), [("four bits", torch.uint8), ("not quantized", torch.float32)])
def test_bases_are_kept_in_what_the_keys_say(tmp_path, name, dtype):
    run = trainer(tmp_path, KEYS[name], max_steps=1)
    run.train()
    weight = run.model.model.layers[0].mlp.down_proj.weight
    tensors = [part for part in leaves(run.optimizer.optimizer.state[weight]["basis"]) if part.numel() >= 32 * 8 / 2]
    assert [part.dtype for part in tensors] == [dtype]
    assert tensors[0].numel() == 32 * 8 // (2 if dtype is torch.uint8 else 1)  # two numbers a byte


def leaves(tree):
    return [leaf for one in tree.values() for leaf in leaves(one)] if isinstance(tree, dict) else [tree]


def test_layers_that_have_settled_renew_less_often(tmp_path):
    """`cos_threshold` 0 doubles each gap as soon as the queue is full."""
    eager = trainer(tmp_path, {**KEYS["four bits"], "cos_threshold": None})
    lazy = trainer(tmp_path, {**KEYS["four bits"], "cos_threshold": 0.0, "queue_size": 1})
    counts = []
    for run in (eager, lazy):
        run.train()
        subspaces = run.optimizer.optimizer.subspaces()
        counts.append(sum(one.renewals for one in subspaces.values()))
    assert 0 < counts[1] < counts[0]
