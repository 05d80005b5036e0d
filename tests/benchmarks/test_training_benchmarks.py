"""Throughput and memory measure what they say: every method trains, every byte has its kind, every figure its bar."""

import mmap
from dataclasses import replace
from functools import partial
from io import StringIO
from typing import ClassVar

import pytest
from rich.console import Console

from benchmarks import steps as command
from benchmarks.common import rounds as rounds_module
from benchmarks.common.cases import Trained, Training
from benchmarks.common.floor import Demand, Speeds, demand
from benchmarks.common.measuring import Footprint, stored_bytes
from benchmarks.common.methods import METHODS, REFERENCE, SIXTEEN_BIT
from benchmarks.common.report import Report, draw
from benchmarks.common.rounds import RunFigures, interleaved, one_by_one
from benchmarks.common.sizes import Llama

MIB = 2**20
OURS = [name for name, method in METHODS.items() if method.peer is None]
SMALL = Llama(hidden=32, intermediate=48, layers=1, heads=2, rank=8, vocabulary=64, sequence=16)
TINY = Training(name=REFERENCE, method=METHODS[REFERENCE], size=SMALL, tokens=64, batch=4, dtype="float32")
PROJECTED = 4 * 32 * 32 + 3 * 32 * 48
OTHERS = 2 * 64 * 32 + 3 * 32
IMAGES = 4 * 8 * 32 + 3 * 8 * 48
BASES = 7 * 8 * 32


def tiny(name: str) -> Training:
    return replace(TINY, name=name, method=METHODS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_every_byte_of_a_step_has_its_kind(name):
    process = Trained(tiny(name))
    for _ in range(2):
        told = process.step()
    kept = process.kept()
    full_rank, fused = not METHODS[name].projects, METHODS[name].gradients in ("projected", "fused")
    gradients = 0 if METHODS[name].update == "backward" else OTHERS + (IMAGES if fused else PROJECTED)
    assert told["gradient_bytes"] == 4 * gradients
    assert kept["weight_bytes"] == 4 * (PROJECTED + OTHERS)
    if METHODS[name].state_bits == 16:
        counters = 4 * (7 * 3 + 5)
        moments = 2 * (PROJECTED + OTHERS) if full_rank else 2 * (IMAGES + OTHERS) + BASES
        assert kept["state_bytes"] == pytest.approx(4 * moments, abs=3 * counters)
    assert told["step_s"] > 0
    assert told["peak_bytes"] >= 0


def test_a_step_may_be_cut_into_batches_but_not_where_weights_move_inside_the_backward():
    options = ("--quick", "--tokens", "512", "--batch", "2")
    (reference, other) = asked("memory", *options, "--methods", "galore/fused")
    assert (reference.name, other.name, other.micro_batches) == (REFERENCE, "galore/fused", 2)
    with pytest.raises(ValueError, match=r"galore-per-layer/fused .* cannot accumulate 2"):
        asked("memory", *options, "--methods", "galore-per-layer/fused")
    with pytest.raises(ValueError, match="tokens is 500"):
        asked("memory", "--quick", "--tokens", "500", "--batch", "2")


def asked(measured: str, *options: str) -> list[Training]:
    return command.trainings(command.parser().parse_args([*options]), measured)


def test_what_is_asked_for_is_what_is_measured():
    speed, memory = asked("speed"), asked("memory")
    assert {one.size.rank for one in speed + memory} == {256}
    assert (speed[0].tokens, speed[0].batch, speed[0].stagger) == (4096, 16, False)
    assert (memory[0].tokens, memory[0].batch, memory[0].stagger, memory[0].size.gap) == (256, 1, True, 200)
    assert [one.name for one in speed] == SIXTEEN_BIT
    assert [one.name for one in memory] == [*SIXTEEN_BIT, "galore-8bit-per-layer/full", "galore-8bit-per-layer/fused"]
    (only,) = asked("speed", "--methods", REFERENCE, "--preset", "llama-60m", "--rank", "4", "--tokens", "512")
    assert (only.size.hidden, only.size.rank, only.tokens) == (512, 4, 512)
    assert {one.method.update for one in asked("speed", "--batch", "4")} == {"step"}
    (small, *_) = asked("memory", "--quick", "--dtype", "float32", "--device", "cuda")
    assert (small.size.hidden, small.dtype, small.device) == (256, "float32", "cuda")


def test_the_peak_holds_what_came_and_went():
    footprint = Footprint("cpu")
    with mmap.mmap(-1, 64 * MIB) as memory:  # a tensor's would go back to the C library, which may keep it
        for _ in range(64):
            memory.write(bytes(MIB))
    assert footprint.peak_bytes() >= 60 * MIB
    footprint.forget()
    assert footprint.peak_bytes() < 30 * MIB


def test_a_projected_gradient_stores_its_image_alone():
    process = Trained(tiny("galore/fused"))
    process.step()
    gradient = process.model.lm_head.weight.detach().clone()
    assert stored_bytes([gradient[:1]]) == gradient.numel() * 4


def demanded(name: str) -> Demand:
    return demand(tiny(name))


def test_the_floor_counts_products_and_traffic():
    plain, full, fused = (demanded(name) for name in (REFERENCE, "galore/full", "galore/fused"))
    linear, head, attention = 6 * 64 * PROJECTED, 6 * 64 * 64 * 32, 6 * 64 * 16 * 32
    assert plain == Demand(operations=linear + head + attention, nbytes=7 * 4 * (PROJECTED + OTHERS))
    assert full.operations - plain.operations == 4 * 8 * PROJECTED
    widths = 4 * 64 + 3 * 80
    assert fused.operations == plain.operations - 2 * 64 * PROJECTED + 2 * 64 * 8 * widths + 2 * 8 * PROJECTED
    assert fused.nbytes == full.nbytes == 4 * (7 * OTHERS + 2 * PROJECTED + 5 * IMAGES + 2 * BASES)
    assert demanded("galore-8bit/fused").nbytes < full.nbytes


def test_speeds_are_measured_and_give_a_floor():
    measured = {"operations_per_s": [1e9, 2e9, 3e9], "bytes_per_s": [4e9]}
    speeds = Speeds(training=TINY, **measured)
    assert speeds.floor_s(Demand(operations=4e9, nbytes=2e9)) == pytest.approx(2.5)
    speeds.measure()
    assert len(speeds.operations_per_s) == 4
    assert min(speeds.bytes_per_s) > 0


class Imagined:
    """Takes the place of a training process: a step lasts as long as its name, and it notes who is alive."""

    alive: ClassVar[set[str]] = set()
    together: ClassVar[list[set[str]]] = []

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        self.alive.add(self.name)
        return self

    def __exit__(self, *_):
        self.alive.discard(self.name)

    def ask(self, command):
        if command == "kept":
            return {"weight_bytes": MIB, "state_bytes": 0}
        self.together.append(set(self.alive))
        return {"step_s": float(len(self.name)), "peak_bytes": 0}


@pytest.mark.parametrize(("room", "groups"), [(10 * MIB, 1), (MIB, 3)])
def test_methods_come_in_groups_beside_the_reference_when_memory_is_short(monkeypatch, room, groups):
    monkeypatch.setattr(rounds_module, "available_bytes", lambda device: room)
    Imagined.together.clear()
    names = [REFERENCE, "galore/full", "galore/fused", "galore-1.0"]
    steps, rounds = [], []
    starts = {name: partial(Imagined, name) for name in names}
    figures = interleaved(starts, 3, steps.append, each_round=lambda: rounds.append(len(steps)))
    assert list(figures) == names
    assert [len(figures[name].steps["step_s"]) for name in names] == [3 * groups, 3, 3, 3]
    assert figures["galore/fused"].gain == pytest.approx(len(REFERENCE) / len("galore/fused"))
    assert len(rounds) == 3 * groups
    assert max(map(len, Imagined.together)) == (4 if groups == 1 else 2)
    assert not Imagined.alive


@pytest.mark.slow
def test_a_real_process_is_measured():
    steps = []
    training = replace(tiny("galore/projected"), thrifty=True)
    figures = one_by_one({"one": training.start}, 1, steps.append)["one"]
    assert len(steps) == 2
    assert figures.steps["gradient_bytes"] == [4 * (OTHERS + IMAGES)]
    assert figures.kept["weight_bytes"] == 4 * (OTHERS + PROJECTED)
    assert min(figures.kept["state_bytes"], figures.step_s, figures.first_s) > 0


def imagined(seconds: float, mib: int) -> RunFigures:
    peaks = {"peak_bytes": [mib * MIB, MIB], "gradient_bytes": [MIB, MIB]}
    return RunFigures(
        first={"step_s": 20.0, "peak_bytes": mib * MIB},
        steps={"step_s": [seconds, seconds, 9.0], **peaks},
        beside_s=[2.3] * 3,
        kept={"state_bytes": 2 * MIB, "weight_bytes": 5 * MIB},
    )


@pytest.fixture
def results() -> dict[str, RunFigures]:
    """Every bar is met exactly."""
    gains = {REFERENCE: 1.0, "galore/fused": 1.15, "galore/full": 0.95, "galore/projected": 0.95}
    shares = {
        REFERENCE: 1.0,
        "galore-8bit-per-layer/full": 0.40,
        "galore-8bit-per-layer/fused": 0.40,
        "galore/fused": 0.60,
    }
    return {name: imagined(2.3 / gains.get(name, 1.0), round(100 * shares.get(name, 0.72))) for name in METHODS}


def test_bars_are_kept_and_missed(results):
    training = asked("speed")[0]
    speed = command.bars(results, training, "speed")
    assert [bar.value for bar in speed] == pytest.approx([1 / 1.15, 1 / 0.95, 1 / 0.95, 1.0])
    assert [bar.at_most for bar in speed] == pytest.approx([1 / 1.15, 1 / 0.95, 1 / 0.95, 1.0])
    results["galore/fused"].steps["step_s"] = [2.01] * 3
    assert not command.bars(results, training, "speed")[0].kept
    training = asked("memory")[0]
    peaks = command.bars(results, training, "memory")
    assert [bar.value for bar in peaks] == pytest.approx([0.4, 0.4, 0.6, 1.0])
    assert all(bar.kept for bar in peaks)
    results["galore/fused"].first["peak_bytes"] = 61 * MIB
    assert not command.bars(results, training, "memory")[2].kept
    assert command.bars(results, TINY, "speed") == command.bars(results, TINY, "memory") == []


def test_the_tables_fit_a_terminal_and_the_kinds_add_up(results, tmp_path):
    shown = {name: results[name] for name in SIXTEEN_BIT}
    terminal = Console(width=80, file=StringIO())
    terminal.print(command.time_sheet(shown, TINY, dict.fromkeys(shown, 1.0)).table())
    terminal.print(command.memory_sheet(results, TINY).table())
    text = terminal.file.getvalue()
    assert all(name in text for name in METHODS)
    assert "…" not in text
    assert sum(command.kinds_bytes(results[REFERENCE]).values()) == 100 * MIB
    sheets = [command.time_sheet(shown, TINY, dict.fromkeys(shown, 1.0)), command.memory_sheet(shown, TINY)]
    assert sheets[0].rows["galore/fused"][f"of {REFERENCE}"] == pytest.approx(1.15)
    draw(Report(title="", sheets=sheets), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_renewal_is_spread_over_its_gap():
    assert command.over_a_gap_s(imagined(2.0, 1), 200) == pytest.approx((199 * 2 + 20) / 200)


def test_the_mlp_block_is_measured_both_ways():
    small, seven_b = command.MLP_SIZES.values()
    seconds = command.measure_mlp(SMALL, 2, lambda: None)
    assert {kind: len(times) for kind, times in seconds.items()} == {"plain": 2, "fused": 2}
    told = command.mlp_report(seven_b, {"plain": [1.0], "fused": [0.87]})
    assert told.sheets[0].rows["fused"]["by arithmetic"] == pytest.approx(0.78, abs=0.005)
    (kept,) = told.bars
    (missed,) = command.mlp_report(seven_b, {"plain": [1.0], "fused": [0.89]}).bars
    assert (kept.kept, missed.kept) == (True, False)
    assert command.mlp_report(small, seconds).bars == []
