"""The benchmark measures what it says: every byte that is kept, every optimizer in turn, every figure by its bar."""

from io import StringIO

import pytest
import torch
from rich.console import Console
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.nn.parameter import UninitializedParameter
from torch.testing._internal.two_tensor import TwoTensor

from benchmarks.common import peers, report
from benchmarks.common.cases import OptimizerStep, floor, weights_with_gradients
from benchmarks.common.measuring import held_bytes, in_turn, seconds_by_part, stored_bytes, tensors_alive
from benchmarks.common.methods import METHODS, OPTIMIZERS, Method
from benchmarks.common.peers import Peer
from benchmarks.common.report import Report, bar_sheet, draw
from benchmarks.common.rounds import RunFigures, Worker
from benchmarks.common.sizes import LLAMA, Llama
from benchmarks.many_cards import Cards, Weight, simulate
from benchmarks.step import ADAMW, FLOOR, GALORE, OURS, STEPPED, StepTimings
from galore_torch.lowbit import QuantizedWeight
from galore_torch.training.pretrain.presets import CONTINUED, PRESETS, configure
from galore_torch.training.settings.methods import method_settings
from tests.forked import TORCH
from tests.waiting import DEADLINE

CASE = OptimizerStep(method=None, size=LLAMA["60m"])


@pytest.fixture
def outcome() -> StepTimings:
    """A case in which every bar is met exactly."""
    figures = {
        name: RunFigures(first={"step_s": 8.0}, steps={"step_s": [0.5, 0.1, 0.2]}, kept={"state_bytes": 0})
        for name in STEPPED
    }
    figures[OURS].first = {"step_s": 0.5}
    figures[OURS].kept = {"state_bytes": LLAMA["60m"].state_elements() * 2}
    figures[FLOOR].steps = {"products_s": [0.1, 0.1], "inner_s": [0.04, 0.04], "weights_s": [0.02, 0.02]}
    return StepTimings(case=CASE, figures=figures, renewal_s=1.0, staggered_s=[1.0, 1.0, 3.0])


def test_a_peer_that_is_missing_is_told_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match="make setup"):
        peers.installed(peers.GALORE_1)


@pytest.mark.slow
def test_a_peer_that_cannot_be_installed_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    peer = Peer(name="none", requirement=str(tmp_path / "no-such-file.whl"))
    with pytest.raises(RuntimeError, match="needs the network once"):
        peers.install(peer)
    assert not peer.folder.exists()


def test_a_view_weighs_the_storage_that_it_keeps():
    """In a process that was forked before any test: none has left tensors that come and go."""
    process = TORCH.start(weigh_a_view)
    process.join(DEADLINE)
    assert process.exitcode == 0


def weigh_a_view() -> None:
    weights = [torch.zeros(100)]
    known = tensors_alive()
    kept = torch.zeros(10, 100)[:2]
    counter = torch.tensor(1.0)
    assert held_bytes([*known, *weights]) == {"state": 10 * 100 * 4, "counters": 4}
    assert kept.numel() == 200
    assert counter.item() == 1


def test_a_weight_in_int8_weighs_what_it_stores():
    weight = torch.nn.Parameter(QuantizedWeight.of(torch.randn(64, 256)))
    assert stored_bytes([weight, None]) == 64 * 256 + 64 * 2


def test_a_tensor_without_memory_of_its_own_weighs_nothing():
    """Whatever a process made before may still be alive in it."""
    known = tensors_alive()
    kept = [torch.empty(3, device="meta"), UninitializedParameter()]
    torch.func.grad(lambda x: kept.append(x) or x.sum())(torch.ones(3))
    torch.func.vmap(lambda x: kept.append(x) or x)(torch.ones(3))
    with FunctionalTensorMode():
        kept += [FunctionalTensor.to_functional(torch.ones(3)), FunctionalTensor.to_functional(torch.ones(3)).elem]
    wrapped = torch.ones(100), torch.ones(100)
    kept += [TwoTensor(*wrapped), torch.eye(3).to_sparse()]
    assert len(kept) == 8
    assert held_bytes(known)["state"] >= 2 * 100 * 4
    assert held_bytes([*known, *kept])["state"] >= 2 * 100 * 4


@pytest.mark.parametrize("name", [name for name in PRESETS if name != CONTINUED])
def test_sizes_are_those_of_the_presets(name):
    config, size = configure(name), LLAMA[name.removeprefix("llama-")]
    model = config.model
    assert (size.hidden, size.intermediate, size.layers) == (model.hidden, model.intermediate, model.layers)
    assert (size.heads, size.vocabulary, size.sequence) == (model.heads, config.data.vocab, config.data.seq)
    assert (size.rank, size.gap) == (config.optimizer.rank, config.optimizer.update_proj_gap)


@pytest.mark.parametrize("name", [name for name in {**OPTIMIZERS, **METHODS} if "1.0" not in name and "," not in name])
def test_methods_are_called_and_set_as_in_training(name):
    method, settings = {**OPTIMIZERS, **METHODS}[name], method_settings(name.partition("/")[0])
    assert method.optimizer.lower() == settings["optim"].replace("-", "")
    assert (method.update, method.weight_bits) == (settings["update"], settings["weight_bits"])
    assert not method.projects or name in OPTIMIZERS or name.partition("/")[2] == method.gradients


@pytest.mark.slow
def test_a_worker_that_dies_is_told_with_its_last_words():
    words = r"one died while asked for 'step':[\s\S]*KeyError: 'none'"
    worker = OptimizerStep(method=Method(optimizer="none"), size=LLAMA["tiny"], dtype="float32").start("one")
    with worker, pytest.raises(RuntimeError, match=words):
        worker.ask("step")


def test_a_worker_whose_time_is_up_is_ended():
    worker = Worker("one", CASE.commands)
    with worker, pytest.raises(RuntimeError, match="one died"):
        worker.ask("step", within_s=0.01)


def test_bars_belong_to_their_cases():
    assert report.limits("mlp_block", {"hidden": 1}) == {}
    assert report.limits("correctness") == {"one basis": 1e-9, "renewing": 1e-6, "float32": 1e-2, "few bits": 0.5}
    assert set(STEPPED) - {FLOOR} <= set(OPTIMIZERS)


def test_the_floor_times_its_three_parts():
    size = Llama(hidden=8, intermediate=12, layers=1, heads=1, rank=2)
    weights = weights_with_gradients(size.weights, torch.float32)
    with torch.no_grad():
        seconds = seconds_by_part(floor(weights, size.rank))
    assert list(seconds) == ["products_s", "inner_s", "weights_s"]
    assert min(seconds.values()) > 0


def test_every_round_is_started_by_another():
    assert "".join(in_turn(list("abc"), 3)) == "abcbcacab"


def test_figures_that_meet_their_bars_keep_them(outcome):
    figures = outcome.bars()
    assert len(figures) == 5
    assert [bar.value for bar in figures] == pytest.approx([1.0, 1.25, 0.125, 0, 3.0])
    assert all(bar.kept for bar in figures[2:])


@pytest.mark.parametrize(
    ("spoil", "missed"),
    [
        (lambda outcome: outcome.figures[OURS].steps.update(step_s=[0.21]), [0, 1]),
        (lambda outcome: outcome.figures[GALORE].first.update(step_s=7.9), [2]),
        (lambda outcome: outcome.figures[OURS].kept.update(state_bytes=1), [3]),
        (lambda outcome: outcome.staggered_s.__setitem__(2, 3.1), [4]),
    ],
)
def test_a_worse_figure_misses_its_bar(outcome, spoil, missed):
    outcome.figures[FLOOR].steps["products_s"] = [0.1001]
    outcome.figures[GALORE].steps["step_s"] = [0.2001]
    assert all(bar.kept for bar in outcome.bars())
    spoil(outcome)
    assert [number for number, bar in enumerate(outcome.bars()) if not bar.kept] == missed


def test_the_report_shows_every_optimizer(outcome, tmp_path):
    terminal = Console(width=80, file=StringIO())
    terminal.print(outcome.costs().table(), bar_sheet(outcome.bars()).table())
    text = terminal.file.getvalue()
    assert all(name in text for name in (OURS, GALORE, ADAMW, "physical floor"))
    assert "…" not in text
    assert outcome.costs().rows[OURS]["step, ms"] == pytest.approx(200)
    shown = Report(title="", sheets=[outcome.costs()])
    draw(shown, tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("method", "sent"), [("adamw", 400), ("galore", 80), ("galore/16 steps", 15), ("fsdp2", 600), ("galore/fsdp2", 440)]
)
def test_two_cards_send_what_a_ring_sends_and_take_as_long_as_their_links_allow(method, sent):
    """Matrices of 10 x 10 at rank 2, 4 bytes a number: each of two cards sends half of it in a gather."""
    cards = Cards(count=2, bandwidth=100.0, hop=0.0, width=4, rank=2, gap=10, work=0.0)
    assert simulate(method, [Weight(10, 10, is_projected=True)], cards) == pytest.approx((sent, sent / 100))
