"""Damaged files in the folder of a stopped fine-tuning: raised with the remedy, or of no effect on the model."""

import pytest

from galore_torch.training.finetune.run import Finetuning
from galore_torch.training.run.run import new_run
from tests.training.during import During, ctrl_c
from tests.training.run.test_hard_times import outcomes_of_damage


@pytest.mark.slow
def test_damage_to_a_stopped_fine_tuning_is_raised_or_harmless(classify, tmp_path):
    config = classify(method="galore", save_every=2, steps=6)
    new_run(Finetuning, config, tmp_path / "whole").train()
    new_run(Finetuning, config, tmp_path / "stopped", callbacks=[During(5, ctrl_c)]).train()
    outcomes = outcomes_of_damage("finetune", tmp_path / "stopped", tmp_path / "whole", 30)
    assert all(outcomes.values()), outcomes
