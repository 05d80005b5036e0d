"""Gradients that are projected, never formed or applied at once, through Transformers' Trainer."""

import math
from typing import ClassVar

import pytest
import torch
from transformers import Trainer, TrainingArguments

from galore_torch import GaLoreAdamW
from galore_torch.integrations.transformers import GaLoreFactory, GaLoreTrainerMixin
from tests.integrations.small_mistral import assert_falls, blocks, mistral

STEPS = 12
# Fused gradients have the norm of what is projected; full ones have their own.
NORMS = {"full": 1e-4, "fused": 0.5}
GALORE = {"rank": 8, "update_proj_gap": 4, "lr": 0.01}
FULL = {"gradients": "full"}


class MixedIn(GaLoreTrainerMixin, Trainer):
    galore = GALORE


def arguments(folder, **given):
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        "learning_rate": 0.01,
    }
    return TrainingArguments(output_dir=str(folder), **{**settings, **given})


def trained(trainer, **resume):
    trainer.train(**resume)
    return [record for record in trainer.state.log_history if "loss" in record]


def by_factory(folder, galore, **given):
    return Trainer(
        model=mistral(),
        args=arguments(folder, **given),
        train_dataset=blocks(),
        optimizer_cls_and_kwargs=(GaLoreFactory, {**GALORE, **galore}),
    )


def losses(log):
    return [record["loss"] for record in log]


@pytest.mark.learning
@pytest.mark.parametrize("gradients", ["projected", "fused"])
@pytest.mark.broad("fused")
def test_accumulation_clipping_and_the_logged_norm_are_those_of_the_images(tmp_path, gradients):
    plain = by_factory(tmp_path, FULL, gradient_accumulation_steps=2, max_grad_norm=1e6)
    formed = by_factory(tmp_path, {"gradients": gradients}, gradient_accumulation_steps=2, max_grad_norm=1e6)
    expected, got = trained(plain), trained(formed)
    # The first basis comes from the first micro-batch here, and from both there.
    assert losses(got) == pytest.approx(losses(expected), rel=0.02)
    assert_falls(losses(got))
    norms = [(float(one["grad_norm"]), float(other["grad_norm"])) for one, other in zip(got, expected, strict=True)]
    assert all(math.isfinite(projected) and 0 < projected < full * 1.05 for projected, full in norms)


@pytest.mark.parametrize("gradients", ["full", "fused"])
@pytest.mark.broad("fused")
def test_updates_inside_the_backward_train_as_step_does(tmp_path, gradients):
    expected = trained(by_factory(tmp_path, FULL, max_grad_norm=0))
    got = trained(by_factory(tmp_path, {"gradients": gradients, "update": "backward"}, max_grad_norm=0))
    assert losses(got) == pytest.approx(losses(expected), rel=1e-4)
    for key in {"learning_rate", "grad_norm"} & expected[0].keys():  # 5.0 logs no norm then
        assert [float(one[key]) for one in got] == pytest.approx(
            [float(one[key]) for one in expected], rel=NORMS[gradients]
        )


@pytest.mark.parametrize(("gradients", "update"), [("fused", "step"), ("fused", "backward")])
@pytest.mark.broad("fused-backward")
def test_a_run_resumes_exactly(tmp_path, gradients, update):
    form = {"gradients": gradients, "update": update}
    whole = trained(by_factory(tmp_path / "whole", form, max_grad_norm=0))
    part = by_factory(tmp_path / "part", form, max_grad_norm=0, save_strategy="steps", save_steps=6)
    trained(part)
    resumed = by_factory(tmp_path / "again", form, max_grad_norm=0)
    log = trained(resumed, resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-6"))
    assert losses(log)[-6:] == losses(whole)[-6:]


def test_the_mixin_makes_what_the_factory_makes(tmp_path):
    mixed = MixedIn(model=mistral(), args=arguments(tmp_path), train_dataset=blocks())
    assert losses(trained(mixed)) == losses(trained(by_factory(tmp_path, {})))
    assert isinstance(mixed.optimizer.optimizer, GaLoreAdamW)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gradient_accumulation_steps": 2, "max_grad_norm": 0}, "gradient_accumulation_steps is 2"),
        ({"max_grad_norm": 1.0}, "max_grad_norm is 1.0"),
    ],
)
def test_what_update_in_backward_excludes_is_told_before_training(tmp_path, given, message):
    class Backward(GaLoreTrainerMixin, Trainer):
        galore: ClassVar = {**GALORE, "update": "backward"}

    model = mistral()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = Backward(model=model, args=arguments(tmp_path, **given), train_dataset=blocks())
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_mixin_without_a_rank_says_so(tmp_path):
    class Rankless(GaLoreTrainerMixin, Trainer):
        galore: ClassVar = {"gradients": "fused"}

    with pytest.raises(ValueError, match="has no rank"):
        Rankless(model=mistral(), args=arguments(tmp_path), train_dataset=blocks()).create_optimizer()
