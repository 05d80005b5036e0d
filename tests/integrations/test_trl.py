"""TRL's SFTTrainer through the factory and DPOTrainer through the mixin, in every form of gradients."""

import copy
from typing import ClassVar

import pytest
import torch
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from galore_torch import GaLoreAdamW, GaLoreAdamW8bit
from galore_torch.integrations.transformers import GaLoreFactory, GaLoreTrainerMixin
from tests.integrations.small_mistral import SEQUENCE, assert_falls, mistral, preferences, text, tokenizer

pytestmark = pytest.mark.slow

GALORE = {"rank": 8, "update_proj_gap": 4, "lr": 0.01}
STEPS = 10
FORMS = [("full", "step"), ("projected", "step"), ("fused", "step"), ("full", "backward"), ("fused", "backward")]
every_form = pytest.mark.parametrize(("gradients", "update"), FORMS, ids=[" ".join(form) for form in FORMS])


def settings(folder, update, **given):
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    lengths = {"max_steps": STEPS, "save_strategy": "no", "per_device_train_batch_size": 4, "max_length": SEQUENCE}
    clipping = {"max_grad_norm": 0.0 if update == "backward" else 1.0}
    return {"output_dir": str(folder), "seed": 0, **quiet, **lengths, **clipping, **given}


def supervised(folder, gradients="full", update="step", galore=None, **given):
    keywords = {**GALORE, "gradients": gradients, "update": update, **(galore or {})}
    return SFTTrainer(
        model=mistral(),
        args=SFTConfig(**settings(folder, update, **given)),
        train_dataset=text(),
        processing_class=tokenizer(),
        optimizer_cls_and_kwargs=(GaLoreFactory, keywords),
    )


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def trained(run, **resume):
    run.train(**resume)
    return losses(run)


# Supervised fine-tuning ----------------------------------------------------------------------------------------------


@pytest.mark.learning
@every_form
def test_sft_trains_and_resumes_exactly(tmp_path, gradients, update):
    whole = trained(supervised(tmp_path / "whole", gradients, update, save_strategy="steps", save_steps=6))
    assert_falls(whole, 0.3)
    resumed = supervised(tmp_path / "again", gradients, update)
    history = trained(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert history[-4:] == whole[-4:]


@pytest.mark.parametrize("gradients", ["projected", "fused"])
def test_sft_recomputes_activations_and_learns_the_same(tmp_path, gradients):
    """TRL's default is checkpointed activations: the forward runs again inside the backward."""
    runs = [supervised(tmp_path, gradients, gradient_checkpointing=recompute) for recompute in (True, False)]
    with_, without = (trained(run) for run in runs)
    recomputing = [any(getattr(one, "gradient_checkpointing", False) for one in run.model.modules()) for run in runs]
    assert recomputing == [True, False]
    assert with_ == pytest.approx(without, rel=1e-3)


@pytest.mark.learning
def test_sft_accumulates_micro_batches_to_the_batch(tmp_path):
    four = trained(supervised(tmp_path, "projected", gradient_accumulation_steps=2, per_device_train_batch_size=2))
    whole = trained(supervised(tmp_path, "full"))
    assert four == pytest.approx(whole, rel=0.05)  # the first basis comes from the first micro-batch there
    assert_falls(four, 0.3)


@pytest.mark.learning
def test_sft_takes_any_recipe_and_its_arguments(tmp_path):
    run = supervised(
        tmp_path, "fused", galore={"optimizer": GaLoreAdamW8bit, "betas": (0.8, 0.9), "group_weight_decay": 0.1}
    )
    assert_falls(trained(run), 0.3)
    made = run.optimizer.optimizer
    assert type(made) is GaLoreAdamW8bit
    assert {(group["betas"], group["weight_decay"]) for group in made.param_groups} == {
        ((0.8, 0.9), 0.1),
        ((0.8, 0.9), 0.0),
    }


# Preferences ---------------------------------------------------------------------------------------------------------


class Preferring(GaLoreTrainerMixin, DPOTrainer):
    """As a reader would write it."""


def preferring(folder, gradients="full", update="step", **given):
    class Formed(Preferring):
        galore: ClassVar = {**GALORE, "gradients": gradients, "update": update}

    return Formed(
        model=mistral(),
        ref_model=mistral(),
        args=DPOConfig(**settings(folder, update, beta=0.5, **given)),
        train_dataset=preferences(),
        processing_class=tokenizer(),
    )


@pytest.mark.learning
@every_form
def test_dpo_learns_to_prefer_and_resumes_exactly(tmp_path, gradients, update):
    run = preferring(tmp_path / "whole", gradients, update, save_strategy="steps", save_steps=6)
    reference = copy.deepcopy(run.ref_model.state_dict())
    whole = trained(run)
    assert whole[0] == pytest.approx(0.6931, abs=1e-3)  # both models are the same at first
    assert_falls(whole, 0.1)
    assert type(run.optimizer.optimizer) is GaLoreAdamW
    assert all(torch.equal(weight, reference[name]) for name, weight in run.ref_model.state_dict().items())
    resumed = preferring(tmp_path / "again", gradients, update)
    history = trained(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert history[-4:] == whole[-4:]


def test_dpo_takes_the_learning_rate_of_the_arguments(tmp_path):
    class Rated(Preferring):
        galore: ClassVar = {"rank": 8}

    run = Rated(
        model=mistral(),
        ref_model=mistral(),
        args=DPOConfig(**settings(tmp_path, "step", learning_rate=0.003)),
        train_dataset=preferences(),
        processing_class=tokenizer(),
    )
    assert {group["lr"] for group in run.create_optimizer().param_groups} == {0.003}
