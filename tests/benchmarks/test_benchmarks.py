"""The benchmark measures what it says: every byte that is kept, every contender in turn, every figure by its bar."""

from io import StringIO

import pytest
import torch
from rich.console import Console

from benchmarks import peers, report
from benchmarks.contender import CONTENDERS, Request, floor, held_bytes, tensors_alive, timed, weights_with_gradients
from benchmarks.measure import ADAMW, FLOOR, GALORE, OURS, Case, Outcome, Timing, in_turn
from benchmarks.peers import Peer
from benchmarks.shapes import LLAMA, LlamaShapes

CASE = Case(shapes="60m", dtype="bfloat16", rounds=2, stagger_steps=3, threads=1)


@pytest.fixture
def outcome() -> Outcome:
    """A case in which every bar is met exactly."""
    timings = {
        name: Timing(rounds_s={"step": [0.5, 0.1, 0.2]}, renewals_s=[8.0]) for name in CONTENDERS if name != FLOOR
    }
    timings[OURS].renewals_s = [0.5, 1.0]
    timings[OURS].state_bytes = LLAMA["60m"].state_elements() * 2
    timings[FLOOR] = Timing(rounds_s={"products": [0.1, 0.1], "inner": [0.04, 0.04], "weights": [0.02, 0.02]})
    return Outcome(case=CASE, timings=timings, staggered_s=[1.0, 1.0, 3.0])


def test_a_peer_that_is_missing_is_told_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match="make setup"):
        peers.environment(peers.GALORE_1)


def test_a_peer_that_cannot_be_installed_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    peer = Peer(name="none", requirement=str(tmp_path / "no-such-file.whl"))
    with pytest.raises(RuntimeError, match="needs the network once"):
        peers.install(peer)
    assert not peer.folder.exists()


def test_a_view_weighs_the_storage_that_it_keeps():
    weights = [torch.zeros(100)]
    known = tensors_alive()
    kept = torch.zeros(10, 100)[:2]
    counter = torch.tensor(1.0)
    assert held_bytes([*known, *weights]) == {"state": 10 * 100 * 4, "counters": 4}
    assert kept.numel() == 200
    assert counter.item() == 1


def test_the_floor_times_its_three_parts(monkeypatch):
    monkeypatch.setitem(LLAMA, "tiny", LlamaShapes(hidden=8, intermediate=12, layers=1, rank=2))
    request = Request(contender=FLOOR, shapes="tiny", dtype="float32")
    weights = weights_with_gradients(request.llama.weights, torch.float32)
    with torch.no_grad():
        seconds = timed(floor(weights, request))
    assert list(seconds) == ["products", "inner", "weights"]
    assert min(seconds.values()) > 0


def test_every_round_is_started_by_another():
    assert "".join(in_turn(list("abc"), 3)) == "abcbcacab"


def test_figures_that_meet_their_bars_keep_them(outcome):
    figures = report.bars(outcome)
    assert len(figures) == 5
    assert [bar.value for bar in figures] == pytest.approx([1.0, 1.25, 0.125, 0, 3.0])
    assert all(bar.kept for bar in figures[2:])


@pytest.mark.parametrize(
    ("spoil", "missed"),
    [
        (lambda outcome: outcome.timings[OURS].rounds_s.update(step=[0.21]), [0, 1]),
        (lambda outcome: outcome.timings[GALORE].renewals_s.__setitem__(0, 7.9), [2]),
        (lambda outcome: setattr(outcome.timings[OURS], "state_bytes", 1), [3]),
        (lambda outcome: outcome.staggered_s.__setitem__(2, 3.1), [4]),
    ],
)
def test_a_worse_figure_misses_its_bar(outcome, spoil, missed):
    outcome.timings[FLOOR].rounds_s["products"] = [0.1001]
    outcome.timings[GALORE].rounds_s["step"] = [0.2001]
    assert all(bar.kept for bar in report.bars(outcome))
    spoil(outcome)
    assert [number for number, bar in enumerate(report.bars(outcome)) if not bar.kept] == missed


def test_the_report_shows_every_contender(outcome, tmp_path):
    console = Console(width=80, file=StringIO())
    console.print(report.tables(outcome))
    text = console.file.getvalue()
    assert all(name in text for name in (OURS, GALORE, ADAMW, "physical floor"))
    assert "…" not in text
    assert report.record(outcome)["contenders"][OURS]["step_s"] == pytest.approx(0.2)
    report.draw([outcome], tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
