"""The LLaMA-7B benchmark on a model of next to nothing: every byte has its kind, every second its part."""

import json
from dataclasses import asdict, replace
from io import StringIO

import pytest
from rich.console import Console

from benchmarks import llama_7b as command
from benchmarks.common.cases import Training
from benchmarks.common.floor import layered_floor_s
from benchmarks.common.measuring import GIB, timed_calls
from benchmarks.common.methods import METHODS
from benchmarks.common.report import draw
from benchmarks.common.sizes import LLAMA, Llama
from benchmarks.llama_7b import PARTS, Outcome, Watched, real_text, state_of

NAME = "galore-8bit-per-layer/fused"
EIGHT = replace(METHODS[NAME], basis_bits=8)
LITTLE = Llama(hidden=64, intermediate=128, layers=2, heads=4, vocabulary=256, rank=32, gap=500, sequence=48)
TINY = Training(name=NAME, size=LITTLE, method=EIGHT, tokens=48, batch=1, learning_rate=1e-3)
SILENT = Console(quiet=True)
SEVEN_B = replace(TINY, size=LLAMA["7b"], tokens=256)


def changed(case: Training, **changes) -> Training:
    """The case with other fields of its size or its method."""
    of_size = {name: value for name, value in changes.items() if hasattr(case.size, name)}
    of_method = {name: value for name, value in changes.items() if name not in of_size}
    size = replace(case.size, **of_size)
    return replace(case, size=size, method=replace(case.method, **of_method), tokens=size.sequence)


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
    losses = [step["loss"] for step in outcome.steps]
    assert losses == sorted(losses, reverse=True)
    assert [step["renewed"] for step in outcome.steps] == [14, 0, 0]
    for step in outcome.steps:
        assert min(step[part] for part in PARTS if part != "renewal_s") > 0
        assert step["peak_bytes"] >= outcome.building["base_bytes"]
        assert step["gradient_bytes"] == 2 * 256 * 64  # the embeddings'
    assert outcome.steps[0]["renewal_s"] > 0 == outcome.steps[1]["renewal_s"]
    assert sum(outcome.kinds_bytes().values()) == outcome.highest["peak_bytes"]
    (bases, basis_codes), (moments, moment_codes) = outcome.state.values()
    assert bases + moments > basis_codes + moment_codes > basis_codes
    assert outcome.bars() == []
    assert min(outcome.floor_s.values()) > 0


def test_the_state_is_counted_from_its_tensors():
    trained = Watched(TINY)
    trained.step()
    (held_bases, basis_codes), (held_moments, moment_codes) = state_of(trained.optimizer).values()
    bases = 32 * 64 * 14
    assert basis_codes == bases
    assert held_bases == bases + 2 * 2 * bases // 256  # and for each group a scale and the number of code 0
    mlp, attention = 2 * 3 * 32 * 128, 2 * 4 * 32 * 64  # coordinates; attention's are too few for 8 bits, as norms are
    assert moment_codes == 2 * mlp + 2 * 4 * attention + 2 * 2 * 256 * 64 + 2 * 4 * 5 * 64
    assert held_moments - moment_codes > 2 * 4 * (mlp + 2 * 256 * 64) // 256


def test_every_layer_and_every_weight_of_a_step_advances():
    counted = []
    trained = Watched(TINY, lambda: counted.append(1))
    assert len(counted) == LITTLE.layers
    trained.step()
    assert len(counted) == LITTLE.layers + len(list(trained.model.parameters()))


def test_the_text_is_real_and_long_enough():
    assert bytes(real_text(SEVEN_B.tokens)[0].tolist()).decode().startswith("# Author:")
    with pytest.raises(ValueError, match="tokens is 1000000"):
        real_text(1_000_000)


def test_the_calls_of_a_method_are_timed_for_a_while():
    class Worker:
        def work(self):
            raise KeyError("work")

    original = Worker.work
    with pytest.raises(KeyError), timed_calls(Worker, "work") as calls:
        Worker().work()
    assert (calls.count, Worker.work) == (1, original)
    assert calls.seconds > 0


@pytest.mark.parametrize("gradients", ["full", "fused"])
def test_the_floor_is_timed_in_rounds_after_one_that_does_not_count(gradients):
    counted = []
    seconds = layered_floor_s(changed(TINY, gradients=gradients), real_text(48), 2, lambda: counted.append(1))
    assert len(counted) == 3
    assert min(seconds.values()) > 0


@pytest.fixture
def outcome() -> Outcome:
    """Every bar is met nearly exactly, with numbers as they would be."""
    step = {
        "loss": 10.0,
        "forward_s": 30.0,
        "backward_s": 60.0,
        "renewal_s": 15 * 60.0,
        "inner_s": 20.0,
        "fold_s": 10.0,
        "other_s": 10.0,
        "renewed": 224,
        "peak_bytes": round(20.5 * GIB),
        "activation_bytes": GIB,
        "gradient_bytes": GIB // 4,
    }
    return Outcome(
        case=SEVEN_B,
        building={"base_bytes": GIB // 2, "seconds": 100.0, "highest_bytes": 15 * GIB},
        steps=[step, *[{**step, "renewal_s": 0.0, "renewed": 0}] * 2],
        weight_bytes=round(12.55 * GIB),
        state={"bases": (960_000_000, 939_524_096), "moments": (3_836_000_000, 3_760_475_904)},
        floor_s={"forward_s": 20.0, "backward_s": 50.0, "inner_s": 15.0, "fold_s": 10.0, "other_s": 5.0},
    )


def test_bars_are_kept_and_missed_and_belong_to_their_cases(outcome):
    kept = outcome.bars()
    assert [round(bar.value, 3) for bar in kept] == [20.5, 1.3, 15.0, 0.349, 0.212, 0.178]
    assert all(bar.kept for bar in kept)
    slower = [outcome.steps[0], *[{**outcome.steps[1], "forward_s": 31.0, "peak_bytes": round(20.6 * GIB)}] * 2]
    assert [bar.kept for bar in replace(outcome, steps=slower).bars()][:3] == [False, False, True]
    least = replace(outcome, case=changed(SEVEN_B, basis_bits=4, weight_bits=8, recomputes=True))
    assert [bar.at_most for bar in least.bars()] == [13.0, 15.0, 0.35, 0.215]
    for other in ({"layers": 2}, {"rank": 512}, {"sequence": 128}, {"gradients": "full"}):
        assert replace(outcome, case=changed(SEVEN_B, **other)).bars() == []


def test_the_state_of_seven_billion_is_that_of_the_paper(outcome):
    states = outcome.states_bytes()
    (adamw, _), (sixteen, _), _, (held, codes) = states.values()
    assert (round(adamw / 1e9, 2), round(sixteen / 1e9, 2)) == (26.95, 9.40)
    assert list(states)[-1] == "8-bit moments, 8-bit bases, held"
    assert held > codes


def test_the_tables_fit_a_terminal(outcome, tmp_path):
    console = Console(width=80, file=StringIO())
    console.print(*(sheet.table() for sheet in outcome.report().sheets))
    text = console.file.getvalue()
    assert "…" not in text
    assert all(words in text for words in ("82.2%", "the whole process", "1.30 of the floor"))
    draw(outcome.report(), tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_json_and_draws(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(LLAMA, "7b", LITTLE)
    small = ["--tokens", "48", "--rank", "8", "--threads", "1", "--quiet"]
    command.main([*small, "--steps", "2", "--floor-rounds", "0", "--json", "--plot", str(tmp_path / "steps.png")])
    told = json.loads(capsys.readouterr().out)
    assert told["case"] == asdict(changed(TINY, rank=8))
    assert [step["renewed"] for step in told["steps"]] == [14, 0]
    assert (told["floor_s"], told["bars"]) == (None, [])
    assert (tmp_path / "steps.png").exists()
    command.main([*small, "--steps", "1", "--floor-rounds", "1"])
    assert "Memory at the peak" in capsys.readouterr().out
