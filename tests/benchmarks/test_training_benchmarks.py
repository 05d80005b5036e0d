"""Throughput and memory measure what they say: every method trains, every byte has its kind, every figure its bar."""

from dataclasses import asdict, replace
from io import StringIO
from typing import ClassVar

import pytest
import torch
from rich.console import Console

from benchmarks import memory, mlp_block, throughput, training_report, turns
from benchmarks.floor import Demand, Speeds, demand
from benchmarks.footprint import Footprint, stored_bytes
from benchmarks.methods import METHODS, REFERENCE, SIXTEEN_BIT
from benchmarks.training import Training
from benchmarks.training_child import TrainingProcess
from benchmarks.training_options import trainings
from benchmarks.turns import Figures, interleaved, one_by_one

MIB = 2**20
OURS = [name for name, method in METHODS.items() if method.peer is None]
TINY = Training(
    method=REFERENCE,
    hidden=32,
    intermediate=48,
    layers=1,
    heads=2,
    vocabulary=64,
    sequence=16,
    tokens=64,
    batch=4,
    rank=8,
    gap=200,
    stagger=True,
    dtype="float32",
    device="cpu",
    threads=1,
)
THE_CASE = {"sequences": 1, "batch": None, "dtype": "bfloat16", "rank": None, "device": "cpu", "threads": 1}
PROJECTED = 4 * 32 * 32 + 3 * 32 * 48
OTHERS = 2 * 64 * 32 + 3 * 32
IMAGES = 4 * 8 * 32 + 3 * 8 * 48
BASES = 7 * 8 * 32


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_every_byte_of_a_step_has_its_kind(name):
    process = TrainingProcess(replace(TINY, method=name))
    for _ in range(2):
        told = process.step()
    kept = process.state()
    full_rank, fused = METHODS[name].gradients == "full rank", METHODS[name].gradients in ("projected", "fused")
    gradients = 0 if METHODS[name].in_backward else OTHERS + (IMAGES if fused else PROJECTED)
    assert told["gradients"] == 4 * gradients
    assert kept["weights"] == 4 * (PROJECTED + OTHERS)
    if not METHODS[name].eight_bit:
        counters = 4 * (7 * 3 + 5)
        moments = 2 * (PROJECTED + OTHERS) if full_rank else 2 * (IMAGES + OTHERS) + BASES
        assert kept["state"] == pytest.approx(4 * moments, abs=3 * counters)
    assert told["seconds"] > 0
    assert told["peak"] >= 0


def test_a_step_may_be_cut_into_batches_but_not_where_weights_move_inside_the_backward():
    options = {**THE_CASE, "preset": "llama-tiny", "tokens": 512, "batch": 2, "gap": 200, "stagger": True}
    (reference, other) = trainings(["fused/step"], **options)
    assert (reference.method, other.method, other.micro_batches) == (REFERENCE, "fused/step", 2)
    with pytest.raises(ValueError, match=r"fused/backward .* cannot accumulate 2"):
        trainings(["fused/backward"], **options)
    with pytest.raises(ValueError, match="tokens is 500"):
        trainings([], **{**options, "tokens": 500})


def test_the_peak_holds_what_came_and_went():
    footprint = Footprint("cpu")
    torch.ones(64 * MIB // 4)
    assert footprint.peak_bytes() >= 60 * MIB
    footprint.forget()
    assert footprint.peak_bytes() < 30 * MIB


def test_a_projected_gradient_stores_its_image_alone():
    process = TrainingProcess(replace(TINY, method="fused/step"))
    process.step()
    gradient = process._model.lm_head.weight.detach().clone()
    assert stored_bytes([gradient[:1]]) == gradient.numel() * 4


def test_the_floor_counts_products_and_traffic():
    plain, full, fused = (demand(replace(TINY, method=name)) for name in (REFERENCE, "full/step", "fused/step"))
    linear, head, attention = 6 * 64 * PROJECTED, 6 * 64 * 64 * 32, 6 * 64 * 16 * 32
    assert plain == Demand(operations=linear + head + attention, nbytes=7 * 4 * (PROJECTED + OTHERS))
    assert full.operations - plain.operations == 4 * 8 * PROJECTED
    widths = 4 * 64 + 3 * 80
    assert fused.operations == plain.operations - 2 * 64 * PROJECTED + 2 * 64 * 8 * widths + 2 * 8 * PROJECTED
    assert fused.nbytes == full.nbytes == 4 * (7 * OTHERS + 2 * PROJECTED + 5 * IMAGES + 2 * BASES)
    assert demand(replace(TINY, method="fused/step/8bit")).nbytes < full.nbytes


def test_speeds_are_measured_and_give_a_floor():
    speeds = Speeds(training=TINY, operations_per_s=[1e9, 2e9, 3e9], bytes_per_s=[4e9])
    assert speeds.floor_s(Demand(operations=4e9, nbytes=2e9)) == pytest.approx(2.5)
    speeds.measure()
    assert len(speeds.operations_per_s) == 4
    assert min(speeds.bytes_per_s) > 0


class Imagined:
    """Takes the place of a training process: a step lasts as long as its name, and it notes who is alive."""

    alive: ClassVar[set[str]] = set()
    together: ClassVar[list[set[str]]] = []

    def __init__(self, training, advance, settings=None):
        self.name, self.figures, self.largest_bytes = training.method, Figures(), MIB
        self.advance = advance

    def __enter__(self):
        self.alive.add(self.name)
        return self

    def __exit__(self, *_):
        self.alive.discard(self.name)

    def first_step(self):
        self.advance(self.name)

    def step(self, *, counts=True):
        self.advance(self.name)
        self.together.append(set(self.alive))
        if counts:
            self.figures.steps_s.append(float(len(self.name)))
        return float(len(self.name))

    def finish(self):
        pass


@pytest.mark.parametrize(("room", "groups"), [(10 * MIB, 1), (MIB, 3)])
def test_methods_come_in_groups_beside_the_reference_when_memory_is_short(monkeypatch, room, groups):
    monkeypatch.setattr(turns, "TrainingRun", Imagined)
    monkeypatch.setattr(turns, "available_bytes", lambda device: room)
    Imagined.together.clear()
    names = [REFERENCE, "full/step", "fused/step", "galore-1.0"]
    steps, rounds = [], []
    figures = interleaved(
        [replace(TINY, method=name) for name in names], 3, steps.append, lambda: rounds.append(len(steps))
    )
    assert list(figures) == names
    assert [len(figures[name].steps_s) for name in names] == [3 * groups, 3, 3, 3]
    assert figures["fused/step"].gain == pytest.approx(len(REFERENCE) / len("fused/step"))
    assert len(rounds) == 3 * groups
    assert max(map(len, Imagined.together)) == (4 if groups == 1 else 2)
    assert not Imagined.alive


@pytest.mark.slow
def test_a_real_process_is_measured():
    steps = []
    results = one_by_one([replace(TINY, method="projected/step")], 1, steps.append, memory.THRIFTY)
    figures = results["projected/step"]
    assert len(steps) == 2
    assert figures.gradient_bytes == 4 * (OTHERS + IMAGES)
    assert figures.weight_bytes == 4 * (OTHERS + PROJECTED)
    assert min(figures.state_bytes, figures.step_s, figures.first_s) > 0


def imagined(seconds: float, mib: int) -> Figures:
    return Figures(
        first_s=20.0,
        steps_s=[seconds, seconds, 9.0],
        beside_s=[2.3] * 3,
        first_peak_bytes=mib * MIB,
        peak_bytes=[mib * MIB, MIB],
        gradient_bytes=MIB,
        state_bytes=2 * MIB,
        weight_bytes=5 * MIB,
    )


@pytest.fixture
def results() -> dict[str, Figures]:
    """Every bar is met exactly."""
    gains = {REFERENCE: 1.0, **throughput.LEAST_GAIN}
    shares = {REFERENCE: 1.0, **memory.AT_MOST}
    return {name: imagined(2.3 / gains.get(name, 1.0), round(100 * shares.get(name, 0.72))) for name in METHODS}


def test_bars_are_kept_and_missed(results):
    (training, *_) = trainings([], **{**THE_CASE, "preset": "llama-350m", "tokens": 4096, "gap": 200, "stagger": True})
    speed = throughput.bars(results, training)
    assert [bar.value for bar in speed] == pytest.approx([1 / 1.15, 1 / 0.95, 1 / 0.95, 1.0])
    results["fused/step"].steps_s = [2.01] * 3
    assert not throughput.bars(results, training)[0].kept
    peaks = memory.bars(results, replace(training, tokens=256, batch=1))
    assert [bar.value for bar in peaks] == pytest.approx([0.4, 0.4, 0.6, 1.0])
    assert all(bar.kept for bar in peaks)
    results["fused/step"].first_peak_bytes = 61 * MIB
    assert not memory.bars(results, replace(training, tokens=256, batch=1))[2].kept
    assert throughput.bars(results, TINY) == memory.bars(results, TINY) == []


def test_the_tables_fit_a_terminal_and_the_kinds_add_up(results, tmp_path):
    shown = {name: results[name] for name in SIXTEEN_BIT}
    console = Console(width=80, file=StringIO())
    console.print(training_report.time_table(shown, TINY, dict.fromkeys(shown, 1.0)))
    console.print(training_report.memory_table(results, TINY))
    text = console.file.getvalue()
    assert all(name in text for name in METHODS)
    assert "…" not in text
    assert sum(training_report.kinds_bytes(results[REFERENCE]).values()) == 100 * MIB
    record = training_report.record(shown, [TINY], dict.fromkeys(shown, 1.0))
    assert record["training"] == asdict(TINY)
    assert record["methods"]["fused/step"]["gain"] == pytest.approx(1.15)
    training_report.draw(shown, TINY, tmp_path / "speed.png", times=True)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_renewal_is_spread_over_its_gap():
    assert imagined(2.0, 1).over_a_gap_s(200) == pytest.approx((199 * 2 + 20) / 200)


def test_the_mlp_block_is_measured_both_ways():
    seconds = mlp_block.measure(mlp_block.Block(hidden=32, intermediate=48, rank=8, tokens=16), 2, lambda: None)
    assert {kind: len(times) for kind, times in seconds.items()} == {"plain": 2, "fused": 2}
    assert mlp_block.bar({"plain": [1.0], "fused": [0.87]}).kept
    assert not mlp_block.bar({"plain": [1.0], "fused": [0.89]}).kept
