"""The LLaMA-7B benchmark on a model of next to nothing: every byte has its kind, every second its part."""

import json
from dataclasses import asdict, replace
from io import StringIO

import pytest
import torch
from rich.console import Console

from benchmarks.common.memory import GIB, Footprint
from benchmarks.common.methods import Method
from benchmarks.common.report import draw
from benchmarks.common.sizes import LLAMA, Llama
from benchmarks.llama_7b import __main__ as command
from benchmarks.llama_7b import floor, report
from benchmarks.llama_7b.floor import Floor
from benchmarks.llama_7b.model import TrainingCase, build_model, real_text
from benchmarks.llama_7b.report import HELD, State, TrainingResult
from benchmarks.llama_7b.steps import Step, Steps, timed_calls
from galore_torch.optim import state_bytes

EIGHT = Method(optimizer="GaLoreAdamW8bit", gradients="fused", update="backward", basis_bits=8)
LITTLE = Llama(hidden=64, intermediate=128, layers=2, heads=4, vocabulary=256, rank=32, gap=500, sequence=48)
TINY = TrainingCase(size=LITTLE, method=EIGHT, learning_rate=1e-3)
SILENT = Console(quiet=True)
SEVEN_B = TrainingCase(size=LLAMA["7b"], method=EIGHT, learning_rate=1e-3)


def changed(case: TrainingCase, **changes) -> TrainingCase:
    """The case with other fields of its size or its method."""
    of_size = {name: value for name, value in changes.items() if hasattr(case.size, name)}
    of_method = {name: value for name, value in changes.items() if name not in of_size}
    return replace(case, size=replace(case.size, **of_size), method=replace(case.method, **of_method))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"gradients": "full", "basis_bits": 16},
        pytest.param({"basis_bits": 4, "recomputes": True}, marks=pytest.mark.slow),
        {"basis_bits": 4, "weight_bits": 8, "recomputes": True},
    ],
)
def test_steps_are_taken_and_every_figure_has_its_place(changes):
    case = changed(TINY, rank=8, **changes)  # no more than the first gradients tell: none renews again
    outcome = command.measure(case, 3, 1, SILENT)
    losses = [step.loss for step in outcome.steps]
    assert losses == sorted(losses, reverse=True)
    assert [step.renewed for step in outcome.steps] == [14, 0, 0]
    for step in outcome.steps:
        assert min(step.forward_s, step.backward_s, step.inner_s, step.fold_s, step.other_s) > 0
        assert step.peak_bytes >= outcome.base_bytes
        assert step.gradient_bytes == 2 * 256 * 64  # the embeddings'
    assert outcome.steps[0].renewal_s > 0 == outcome.steps[1].renewal_s
    assert sum(outcome.kinds_bytes().values()) == outcome.highest.peak_bytes
    assert outcome.state.held > outcome.state.codes > outcome.state.basis_codes
    assert report.bars(outcome) == []
    assert min(asdict(outcome.floor).values()) > 0


def test_the_state_is_counted_from_its_tensors():
    steps, optimizer = steps_of(TINY)
    steps.step()
    state = State.of(optimizer, state_bytes(optimizer))
    bases = 32 * 64 * 14
    assert state.basis_codes == bases
    assert state.bases == bases + 2 * 2 * bases // 256  # and for each group a scale and the number of code 0
    mlp, attention = 2 * 3 * 32 * 128, 2 * 4 * 32 * 64  # coordinates; attention's are too few for 8 bits, as norms are
    assert state.codes == bases + 2 * mlp + 2 * 4 * attention + 2 * 2 * 256 * 64 + 2 * 4 * 5 * 64
    assert state.held - state.codes - (state.bases - bases) > 2 * 4 * (mlp + 2 * 256 * 64) // 256


def steps_of(case: TrainingCase, advance=lambda: None):
    model = build_model(case)
    optimizer = case.method.build_over(model, case.size, lr=case.learning_rate)
    return Steps(model, optimizer, case, Footprint("cpu"), advance), optimizer


def test_every_weight_advances_a_step_and_the_model_is_left_as_it_was():
    counted = []
    steps, _ = steps_of(TINY, lambda: counted.append(1))
    steps.step()
    model = steps.model
    assert len(counted) == len(list(model.parameters()))
    steps.close()
    ids = real_text(LITTLE)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(type(weight.grad) is torch.Tensor for weight in model.parameters())
    assert len(counted) == len(list(model.parameters()))


def test_the_text_is_real_and_long_enough():
    assert bytes(real_text(SEVEN_B.size)[0].tolist()).decode().startswith("# Author:")
    with pytest.raises(ValueError, match="tokens is 1000000"):
        real_text(replace(LITTLE, sequence=1_000_000))


def test_the_calls_of_a_method_are_timed_for_a_while():
    class Worker:
        def work(self):
            raise KeyError("work")

    original = Worker.work
    with pytest.raises(KeyError), timed_calls(Worker, "work") as calls:
        Worker().work()
    assert (calls.count, Worker.work) == (1, original)
    assert calls.seconds > 0


@pytest.mark.parametrize("bits", [16, 8])
def test_the_floor_of_few_bits_is_that_of_bfloat16(bits):
    counted = []
    case = changed(TINY, weight_bits=bits, gradients="full")
    floor.measure(build_model(TINY), case, 2, lambda: counted.append(1))
    assert len(counted) == 2 * floor.parts(case)


@pytest.fixture
def outcome() -> TrainingResult:
    """Every bar is met nearly exactly, with numbers as they would be."""
    step = Step(
        loss=10.0,
        forward_s=30.0,
        backward_s=60.0,
        renewal_s=15 * 60.0,
        inner_s=20.0,
        fold_s=10.0,
        other_s=10.0,
        renewed=224,
        peak_bytes=round(20.5 * GIB),
        activation_bytes=GIB,
        gradient_bytes=GIB // 4,
    )
    return TrainingResult(
        case=SEVEN_B,
        steps=[step, *[replace(step, renewal_s=0.0, renewed=0)] * 2],
        base_bytes=GIB // 2,
        building_s=100.0,
        building_bytes=15 * GIB,
        weight_bytes=round(12.55 * GIB),
        state=State(held=4_796_000_000, bases=960_000_000, codes=4_700_000_000, basis_codes=939_524_096),
        floor=Floor(pass_s=70.0, project_s=5.0, fold_s=10.0, inner_s=15.0),
    )


def test_bars_are_kept_and_missed_and_belong_to_their_cases(outcome):
    kept = report.bars(outcome)
    assert [round(bar.value, 3) for bar in kept] == [20.5, 1.3, 15.0, 0.349, 0.212, 0.178]
    assert all(bar.kept for bar in kept)
    slower = [outcome.steps[0], *[replace(outcome.steps[1], forward_s=31.0, peak_bytes=round(20.6 * GIB))] * 2]
    assert [bar.kept for bar in report.bars(replace(outcome, steps=slower))][:3] == [False, False, True]
    least = replace(outcome, case=changed(SEVEN_B, basis_bits=4, weight_bits=8, recomputes=True))
    assert [bar.at_most for bar in report.bars(least)] == [13.0, 15.0, 0.35, 0.215]
    for other in ({"layers": 2}, {"rank": 512}, {"sequence": 128}, {"gradients": "full"}):
        assert report.bars(replace(outcome, case=changed(SEVEN_B, **other))) == []


def test_the_state_of_seven_billion_is_that_of_the_paper(outcome):
    states = outcome.states_bytes()
    (adamw, _), (sixteen, _), _, (held, codes) = states.values()
    assert (round(adamw / 1e9, 2), round(sixteen / 1e9, 2)) == (26.95, 9.40)
    assert list(states)[-1] == HELD.format(8)
    assert held > codes


def test_the_tables_fit_a_terminal(outcome, tmp_path):
    console = Console(width=80, file=StringIO())
    console.print(*(sheet.table() for sheet in report.sheets(outcome)))
    text = console.file.getvalue()
    assert "…" not in text
    assert all(words in text for words in ("82.2%", "the whole process", "1.30 of the floor"))
    draw(report.report(outcome), tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_json_and_draws(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(LLAMA, "7b", LITTLE)
    small = ["--tokens", "48", "--rank", "8", "--threads", "1", "--quiet"]
    command.main([*small, "--steps", "2", "--floor-rounds", "0", "--json", "--plot", str(tmp_path / "steps.png")])
    told = json.loads(capsys.readouterr().out)
    assert told["case"] == changed(TINY, rank=8).record()
    assert [step["renewed"] for step in told["steps"]] == [14, 0]
    assert (told["floor"], told["bars"]) == (None, [])
    assert (tmp_path / "steps.png").exists()
    command.main([*small, "--steps", "1", "--floor-rounds", "1"])
    assert "Memory at the peak" in capsys.readouterr().out
