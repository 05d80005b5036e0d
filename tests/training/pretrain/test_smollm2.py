"""Continual training of a published model of 135M parameters, where `benchmarks.finetuning` has brought it."""

import json

import pytest

from benchmarks.finetuning import SMOLLM2
from galore_torch.training.pretrain.presets import configure
from galore_torch.training.pretrain.run import Pretraining
from galore_torch.training.run import records
from galore_torch.training.run.folder import RunFolder
from galore_torch.training.run.run import new_run, resumed_run
from tests.training.during import During, ctrl_c
from tests.training.evaluation.test_evaluation import told
from tests.training.pretrain.test_pretrain import assert_same_run

FOUND = sorted(SMOLLM2.folder.glob("**/*.gguf"))


@pytest.mark.slow
@pytest.mark.learning
@pytest.mark.skipif(not FOUND, reason="`python -m benchmarks.finetuning docstrings` brings SmolLM2 as a package")
def test_it_goes_on_on_local_text_and_is_resumed_to_the_bit(texts, cache, tmp_path):
    config = configure(
        model=str(FOUND[0].parent), gguf_file=FOUND[0].name, data=str(texts), cache=str(cache), seq=64, batch=2,
        micro_batch=2, steps=20, eval_every=0, eval_tokens=1280, rank=64, update_proj_gap=5,
    )  # fmt: skip
    result = new_run(Pretraining, config, tmp_path / "whole").train()
    losses = [one["loss"] for one in records.read(RunFolder(tmp_path / "whole").metrics) if "loss" in one]
    assert sum(losses[-5:]) < sum(losses[:5])
    new_run(Pretraining, config, tmp_path / "parts", callbacks=[During(11, ctrl_c)]).train()
    resumed_run(Pretraining, tmp_path / "parts").train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    found = json.loads(told("evaluate", tmp_path / "parts", "--json"))
    assert found["perplexity"] == pytest.approx(result.perplexity, rel=1e-4)
