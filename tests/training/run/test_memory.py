"""What a run says of its memory, before it and after it."""

import io
from types import SimpleNamespace

import psutil
import pytest
import torch
from rich.console import Console
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from galore_torch import devices
from galore_torch.training.pretrain.run import Pretraining
from galore_torch.training.run import machine
from galore_torch.training.run.run import new_run

MIB = 2**20


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


@pytest.mark.parametrize(
    ("dtype", "autocast", "is_fast", "told"),
    [
        ("float32", False, False, None),
        ("bfloat16", False, True, None),
        ("bfloat16", False, False, ": use --dtype float32."),
        ("float32", True, False, ": leave out --bf16."),
        ("bfloat16", True, False, ": leave out --bf16 and use --dtype float32."),
    ],
)
def test_a_run_warns_of_bfloat16_where_the_cpu_has_no_instructions_for_it(dtype, autocast, is_fast, told, monkeypatch):
    monkeypatch.setattr(devices, "cpu_multiplies_bfloat16", lambda: is_fast)
    model, said = torch.nn.Linear(4, 4, dtype=getattr(torch, dtype)), io.StringIO()
    trainer = SimpleNamespace(model=model, args=SimpleNamespace(bf16=autocast))
    machine.warn_of_bfloat16(trainer, Console(file=said, width=300))
    assert bool(said.getvalue()) == bool(told)
    assert (told or "") in said.getvalue()


def test_the_warning_of_bfloat16_comes_before_the_first_step(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "cpu_multiplies_bfloat16", lambda: False)
    said = io.StringIO()
    new_run(Pretraining, tiny(steps=1, dtype="bfloat16"), tmp_path / "run", console=Console(file=said, width=300))
    assert "no instructions for bfloat16" in said.getvalue()


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


@pytest.mark.usefixtures("planned")
def test_the_process_itself_is_what_is_taken_before(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "taken_bytes", lambda: 10**12)
    said = io.StringIO()
    new_run(Pretraining, tiny(steps=1), tmp_path / "run", console=Console(file=said, width=300))
    assert ": 1,000.00 GB the process itself" in said.getvalue()


class Workspaces(TorchDispatchMode):
    """Stands for a GPU, whose allocator keeps 32 MiB for each thread and library that has made a product."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: set[tuple[str, bool]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            in_backward = torch._C._current_graph_task_id() != -1
            self.kept.add((func.name(), in_backward))
        return func(*args, **(kwargs or {}))


class NoGPU(TorchFunctionMode):
    """Makes on the CPU what is asked for on a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return func(*args, **({**kwargs, "device": "cpu"} if kwargs.get("device") == "cuda" else kwargs))


def test_on_a_gpu_what_products_keep_is_taken_already(monkeypatch):
    with Workspaces() as gpu, NoGPU():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000 + 32 * MIB * len(gpu.kept))
        before = torch.random.get_rng_state()
        assert machine.taken_bytes() == 1000 + 3 * 32 * MIB
    assert gpu.kept == {("aten::mm", False), ("aten::addmm", False), ("aten::mm", True)}
    assert torch.equal(torch.random.get_rng_state(), before)
