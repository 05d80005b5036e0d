"""What whole training steps came to: time and memory as tables, against their bars, and as JSON."""

from collections.abc import Mapping

from benchmarks.common.bars import Bar, judged
from benchmarks.common.memory import MIB
from benchmarks.common.methods import REFERENCE
from benchmarks.common.report import Sheet
from benchmarks.common.rounds import RunFigures
from benchmarks.common.training import Training

PAPERS_GAP = 200
OURS, PEER = "galore-per-layer/fused", "galore-1.0-per-layer"
KINDS = ("gradients", "state", "the rest")
Results = Mapping[str, RunFigures]


def kinds_bytes(one: RunFigures) -> dict[str, float]:
    """Return what the peak of an ordinary step consists of, above the weights.

    Gradients count as they are when the backward pass has ended; one that comes and goes within it is in the rest.
    """
    gradient_bytes, state_bytes = one.steps["gradient_bytes"][-1], one.kept["state_bytes"]
    rest = max(one.steps["peak_bytes"]) - gradient_bytes - state_bytes
    return dict(zip(KINDS, (gradient_bytes, state_bytes, rest), strict=True))


def over_a_gap_s(one: RunFigures, gap: int) -> float:
    """Return the seconds of a step on average over a gap in which every layer renews once."""
    return ((gap - 1) * one.step_s + one.first_s) / gap


def bars(results: Results, training: Training, measured: str) -> list[Bar]:
    """Return our figures against their bars, if this is a case that has bars; `measured` is "speed" or "memory"."""
    figures = {}
    for name, one in results.items():
        figures[f"step of {name} / {REFERENCE}'s"] = 1 / one.gain if one.beside_s else float("nan")
        figures[f"peak of {name} / {REFERENCE}'s"] = one.highest_bytes / results[REFERENCE].highest_bytes
    if OURS in results and PEER in results:
        figures[f"step of {OURS} / {PEER}'s"] = results[OURS].step_s / results[PEER].step_s
        figures[f"peak of {OURS} / {PEER}'s"] = results[OURS].highest_bytes / results[PEER].highest_bytes
    return judged("steps", {"measured": measured, **training.case()}, figures)


def time_sheet(results: Results, training: Training, floors_s: Mapping[str, float]) -> Sheet:
    """Return tokens per second of every method, against the reference and the floor."""
    rows = {
        name: {
            "tokens/s": training.tokens / one.step_s,
            f"of {REFERENCE}": one.gain,
            "step, s": one.step_s,
            "first, s": one.first_s,
            f"tokens/s, gap {PAPERS_GAP}": training.tokens
            / (one.step_s if name.startswith(REFERENCE) else over_a_gap_s(one, PAPERS_GAP)),
            "floor": f"{floors_s[name] / one.step_s:.0%}",
        }
        for name, one in results.items()
    }
    caption = (
        "Medians of ordinary steps. Every basis is found in the first step; "
        f"over a gap of {PAPERS_GAP} steps each costs that once. Floor: the share of the step that its "
        "matrix products and its optimizer's reads and writes take at the speeds of this machine."
    )
    return Sheet(title=training.title, rows=rows, caption=caption, drawn=("tokens/s",), unit="tokens per second")


def memory_sheet(results: Results, training: Training) -> Sheet:
    """Return the peak memory of every method and what it consists of, in MiB."""
    weights = next(iter(results.values())).kept["weight_bytes"]
    rows = {
        name: {
            "peak": round(max(one.steps["peak_bytes"]) / MIB),
            f"of {REFERENCE}": one.highest_bytes / results[REFERENCE].highest_bytes,
            "first": round(one.first["peak_bytes"] / MIB),
            **{kind: round(size / MIB) for kind, size in kinds_bytes(one).items()},
        }
        for name, one in results.items()
    }
    caption = (
        f"MiB above the weights, which take {weights / MIB:,.0f}. Peak: of the steps after the first; the ratio is "
        "that of the highest of all. Gradients: when the backward pass has ended. The rest: activations and what comes "
        "and goes."
    )
    return Sheet(title=training.title, rows=rows, caption=caption, drawn=KINDS, unit="peak memory above weights, MiB")
