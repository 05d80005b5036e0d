"""The live figures: they arrive in the log's history and at trackers, whatever the form of gradients, and are right."""

import pytest
from transformers import Trainer, TrainerCallback

from galore_torch.integrations.callback import GaLoreCallback, galore_in
from galore_torch.integrations.transformers import GaLoreFactory
from galore_torch.optim import state_bytes
from tests.integrations.small_mistral import blocks, mistral
from tests.integrations.test_forms_of_gradients import GALORE, STEPS, arguments

LATER = {"galore/overlap", "galore/overlap_min", "galore/captured", "galore/captured_min"}
ALWAYS = {"galore/renewals", "galore/renewal_seconds", "galore/state_bytes"}
MODES = [("full", "step"), ("projected", "step"), ("fused", "step"), ("full", "backward"), ("fused", "backward")]


class Tracker(TrainerCallback):
    """Stands before the user's callbacks, as those of `report_to` do, and keeps a copy of what it is sent."""

    def __init__(self):
        self.sent = []

    def on_log(self, args, state, control, logs=None, **_):
        self.sent.append((state.global_step, dict(logs)))


def training(folder, galore, **given):
    tracker = Tracker()
    trainer = Trainer(
        model=mistral(),
        args=arguments(folder, **{"max_grad_norm": 0, **given}),
        train_dataset=blocks(),
        callbacks=[tracker],
        optimizer_cls_and_kwargs=(GaLoreFactory, {**GALORE, **galore}),
    )
    trainer.add_callback(GaLoreCallback(trainer))
    return trainer, tracker


def ours(history):
    return [record for record in history if "galore/renewals" in record]


@pytest.mark.parametrize(("gradients", "update"), MODES)
@pytest.mark.broad("projected-step", "fused-backward")
def test_the_figures_arrive_and_are_the_optimizers_own(tmp_path, gradients, update):
    trainer, tracker = training(tmp_path, {"gradients": gradients, "update": update})
    trainer.train()
    figures = ours(trainer.state.log_history)
    assert [record["step"] for record in figures] == list(range(1, STEPS + 1))
    assert [step for step, sent in tracker.sent if "galore/renewals" in sent] == list(range(1, STEPS + 1))
    assert figures[0].keys() >= ALWAYS
    assert not figures[0].keys() & LATER  # no weight has had two bases
    assert figures[-1].keys() >= ALWAYS | LATER

    galore = galore_in(trainer.optimizer)
    told = galore.subspaces().values()
    assert sum(record["galore/renewals"] for record in figures) == sum(one.renewals for one in told)
    assert sum(record["galore/renewal_seconds"] for record in figures) == pytest.approx(galore._outcomes.seconds)
    assert galore._outcomes.seconds > 0
    assert figures[-1]["galore/state_bytes"] == state_bytes(galore)
    for name in ("overlap", "captured"):
        values = [getattr(one, name) for one in told]
        assert figures[-1][f"galore/{name}"] == pytest.approx(sum(values) / len(values))
        assert figures[-1][f"galore/{name}_min"] == pytest.approx(min(values))
    assert all(0 < one.captured <= 1 for one in told)


def test_renewals_are_counted_between_records_and_after_a_checkpoint(tmp_path):
    trainer, _ = training(tmp_path, {"stagger": False}, logging_steps=3, save_strategy="steps", save_steps=6)
    trainer.train()
    weights = len(galore_in(trainer.optimizer).subspaces())
    counted = [record["galore/renewals"] for record in ours(trainer.state.log_history)]
    assert sum(counted) == 3 * weights  # in the steps 1, 5 and 9 or as the turns fall
    resumed, _ = training(tmp_path, {"stagger": False}, logging_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    again = [record["galore/renewals"] for record in ours(resumed.state.log_history)]
    assert again == counted
    last, expected = ours(resumed.state.log_history)[-1], ours(trainer.state.log_history)[-1]
    assert {name: last[name] for name in LATER} == {name: expected[name] for name in LATER}


def test_without_galore_nothing_is_logged(tmp_path):
    trainer = Trainer(model=mistral(), args=arguments(tmp_path, max_steps=2), train_dataset=blocks())
    trainer.add_callback(GaLoreCallback(trainer))
    trainer.train()
    assert ours(trainer.state.log_history) == []
    assert len(trainer.state.log_history) == 3


def test_each_renewal_is_handed_on_in_its_step_and_those_before_a_checkpoint_are_not(tmp_path):
    trainer, _ = training(tmp_path, {}, save_strategy="steps", save_steps=6)
    told = []
    trainer.add_callback(GaLoreCallback(on_renewal=lambda *renewal: told.append(renewal)))
    trainer.train()
    subspaces = galore_in(trainer.optimizer).subspaces()
    assert {name: one for _, name, one in told} == subspaces
    assert len(told) == sum(one.renewals for one in subspaces.values())
    resumed, _ = training(tmp_path, {})
    again = []
    resumed.add_callback(GaLoreCallback(on_renewal=lambda *renewal: again.append(renewal)))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again == [renewal for renewal in told if renewal[0] > 6]
