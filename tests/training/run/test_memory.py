"""What a run says of its memory, before it and after it."""

import io

import psutil
import pytest
from rich.console import Console

from galore_torch.training.pretrain.run import Pretraining
from galore_torch.training.run.run import new_run


@pytest.mark.usefixtures("planned")
def test_a_run_says_what_it_will_need_and_warns_where_less_is_free(tiny, tmp_path, monkeypatch):
    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    said = io.StringIO()
    run = new_run(Pretraining, tiny(steps=1), tmp_path / "run", console=Console(file=said, width=300))
    assert "planned peak memory" in said.getvalue()
    assert "the process itself" in said.getvalue()
    assert "1.0 kB are free" in said.getvalue()
    result = run.train()
    assert 0 < result.planned_memory_bytes < 2 * result.peak_memory_bytes


@pytest.mark.usefixtures("planned")
def test_a_model_that_cannot_be_planned_is_trained_all_the_same(tiny, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such thing")

    monkeypatch.setattr("galore_torch.training.run.machine.plan", broken)
    said = io.StringIO()
    result = new_run(Pretraining, tiny(steps=1), tmp_path / "run", console=Console(file=said, width=300)).train()
    assert "cannot be planned: no such thing" in said.getvalue()
    assert result.finished
    assert result.planned_memory_bytes is None
