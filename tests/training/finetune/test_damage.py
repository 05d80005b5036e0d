"""Damaged files in the folder of a stopped fine-tuning: raised with the remedy, or of no effect on the model."""

import shutil

import pytest

from galore_torch.training.finetune.run import Finetuning
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.run import new_run
from tests.training.finetune.conftest import CtrlC
from tests.training.run.test_hard_times import DAMAGE, damages, galore


@pytest.mark.slow
def test_damage_to_a_stopped_fine_tuning_is_raised_or_harmless(classify, tmp_path):
    config, count = classify(method="galore", save_every=2), 30
    new_run(Finetuning, config, tmp_path / "whole").train()
    new_run(Finetuning, config, tmp_path / "stopped", callbacks=[CtrlC(5)]).train()
    expected = (RunFolder(tmp_path / "whole").model / "model.safetensors").read_bytes()
    raised = 0
    for file, how, at in damages(tmp_path / "stopped", count):
        out = tmp_path / "run"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "stopped", out)
        DAMAGE[how](out / file, at)
        before = {path for path in out.rglob("*") if path.is_file()}
        status, said = galore("finetune", "--resume", "--out", out)
        if status == 0:
            assert (RunFolder(out).model / "model.safetensors").read_bytes() == expected, (file, how, at)
        else:
            assert (status, "Traceback" in said) == (2, False), (file, how, at, said)
            assert any(word in said for word in ("estore", "another --out", "--resume")), said
            assert {path for path in out.rglob("*") if path.is_file()} >= before, (file, how, at)
            raised += 1
    assert 0 < raised < count
