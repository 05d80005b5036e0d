"""Trainer, Accelerate and a plain torch loop end at the same weights: accumulation, clipping, schedule and all."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator

from galore_torch import GaLoreAdamW, param_groups
from tests.integrations.small_mistral import blocks, mistral

STEPS = 6
ACCUMULATION = 4
MAX_NORM = 0.5  # below the norm of every step
LR = 0.01


def model():
    return mistral().double()  # so that no rounding hides a difference


def optimizer_of(trained):
    return GaLoreAdamW(param_groups(trained, 8, update_proj_gap=3), lr=LR, weight_decay=0.1)


def batches():
    return DataLoader(blocks().select(range(STEPS * ACCUMULATION * 2)), batch_size=2, collate_fn=default_data_collator)


def schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)


@pytest.fixture(scope="module")
def plainly_trained():
    """The weights of a loop in torch alone, and the gradients' norms."""
    trained = model()
    optimizer = optimizer_of(trained)
    scheduler = schedule(optimizer)
    norms = []
    for index, batch in enumerate(batches(), 1):
        (trained(**batch).loss / ACCUMULATION).backward()
        if index % ACCUMULATION == 0:
            norms.append(torch.nn.utils.clip_grad_norm_(trained.parameters(), MAX_NORM).item())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert min(norms) > MAX_NORM
    return trained, norms


def assert_same_weights(one, other):
    for (name, ours), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_trainer_is_the_plain_loop(plainly_trained, tmp_path):
    trained = model()
    arguments = TrainingArguments(
        tmp_path,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=MAX_NORM,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    optimizer = optimizer_of(trained)
    trainer = Trainer(trained, arguments, train_dataset=blocks(), optimizers=(optimizer, schedule(optimizer)))
    trainer.train()
    plain, norms = plainly_trained
    assert_same_weights(trained, plain)
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(norms, rel=1e-6)


def test_accelerate_is_the_plain_loop_and_goes_on_from_a_save(plainly_trained, tmp_path):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    trained = model()
    optimizer = optimizer_of(trained)
    trained, optimizer, scheduler, loader = accelerator.prepare(trained, optimizer, schedule(optimizer), batches())

    def train(some):
        for batch in some:
            with accelerator.accumulate(trained):
                accelerator.backward(trained(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained.parameters(), MAX_NORM)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    every = list(loader)
    half = len(every) // 2
    train(every[:half])
    accelerator.save_state(tmp_path)
    train(every[half:])
    plain, _ = plainly_trained
    assert_same_weights(accelerator.unwrap_model(trained), plain)

    set_seed(1)
    accelerator.load_state(tmp_path)
    train(every[half:])
    assert_same_weights(accelerator.unwrap_model(trained), plain)
