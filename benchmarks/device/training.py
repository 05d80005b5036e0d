"""Whole training steps of a LLaMA with random weights on random tokens: tokens a second, and memory at its highest."""

from dataclasses import replace
from functools import partial
from importlib.util import find_spec

from benchmarks.common.memory import GIB, clear, stored_bytes
from benchmarks.common.methods import METHODS, REFERENCE, Method
from benchmarks.common.timing import kernels, seconds_of, timed
from benchmarks.common.training import Trained, Training
from benchmarks.device.session import Figures, Session

LEAST = ("galore-8bit" if find_spec("bitsandbytes") else "galore") + "-per-layer/fused"
RECOMPUTING, IN_INT8 = ", activations recomputed", ", INT8 weights"
PLAN: list[tuple[str, list[str]]] = [
    ("350m", [REFERENCE, *(f"galore{how}" for how in ("/fused", "-per-layer/fused", "/full", "/projected"))]),
    ("350m", ["galore-per-layer/full"]),
    ("7b", [LEAST + RECOMPUTING, LEAST + IN_INT8 + RECOMPUTING]),
    ("1b", [REFERENCE, *(f"galore{how}" for how in ("/fused", "-per-layer/fused", "/full", "/projected"))]),
    ("350m", ["galore-per-layer/fused" + IN_INT8, LEAST]),
    ("7b", ["galore-per-layer/fused", REFERENCE + RECOMPUTING]),
]
"""The most telling first: what comes after the time is up is left out."""
NEEDS_S = {"7b": 45.0, "1b": 15.0}
"""Seconds that a row takes, about; others take 8."""


def measure(session: Session) -> None:
    """Report the figures of each model trained in each way."""
    for name, method in ((name, method) for name, methods in PLAN for method in methods if name in session.sizes):
        size = session.sizes[name]
        sequences = 2 if session.small else {"7b": 1}.get(name, 8)
        training = Training(
            name=method,
            method=_method(method),
            size=size,
            tokens=sequences * size.sequence,
            batch=sequences,
            device=session.device,
        )
        session.try_row(f"{name}, {method}", partial(_figures, training), needs_s=NEEDS_S.get(name, 8.0))


def _method(name: str) -> Method:
    bits = 8 if IN_INT8 in name else 16
    return replace(METHODS[name.split(",", maxsplit=1)[0]], weight_bits=bits, recomputes=RECOMPUTING in name)


def _figures(training: Training) -> Figures:
    device = training.device
    clear(device)
    trained = Trained(training)
    step = partial(trained.take, trained.draw())
    figures: Figures = {
        "weights_GiB": stored_bytes(trained.model.parameters()) / GIB,
        "first_s": seconds_of(step, device),
    }
    figures["first_peak_GiB"] = trained.footprint.highest_gib()
    clear(device)
    trained.footprint.forget()
    figures |= timed(step, device)
    figures["tokens_s"] = 1e3 * training.tokens / figures["wall_ms"]
    figures["peak_GiB"] = trained.footprint.highest_gib()
    return figures | kernels(step, device)
