"""What a step costs: `step()` and a renewal on all weights of a model, and whole training steps, by optimizer and mode.

The staggered steps are those of a run in which layers take turns to renew: none may take much longer than the others.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from benchmarks.common.measuring import clear
from benchmarks.common.methods import METHODS, OPTIMIZERS, REFERENCE
from benchmarks.common.optimizer_step import RARELY, OptimizerStep
from benchmarks.common.sizes import Llama
from benchmarks.common.training import Training
from benchmarks.device.session import Figures, Session

STEP_S = {"7b": 30.0, "1b": 10.0}
"""Seconds that a row of `step()` takes, about; others take 5."""
TRAINING_S = {"7b": 45.0, "1b": 15.0}
"""Seconds that a row of whole steps takes, about; others take 8."""
PEER_S = 90.0
"""The most that a process of a published optimizer may take."""
STAGGERED_STEPS = 400

LEAST = ("galore-8bit" if find_spec("bitsandbytes") else "galore") + "-per-layer/fused"
RECOMPUTING, IN_INT8 = ", activations recomputed", ", INT8 weights"
MODES = [REFERENCE, "galore/fused", "galore-per-layer/fused", "galore/full", "galore/projected"]
PLAN: list[tuple[str, list[str]]] = [
    ("350m", [*MODES, "galore-per-layer/full"]),
    ("7b", [LEAST + RECOMPUTING, LEAST + IN_INT8 + RECOMPUTING]),
    ("1b", MODES),
    ("350m", ["galore-per-layer/fused" + IN_INT8, LEAST]),
    ("7b", ["galore-per-layer/fused", REFERENCE + RECOMPUTING]),
]
"""What is trained, the most telling first: what comes after the time is up is left out."""


def measure_training(session: Session) -> None:
    """Report the figures of each model trained in each way."""
    for name, which in ((name, which) for name, methods in PLAN for which in methods if name in session.sizes):
        size, sequences = session.sizes[name], 2 if session.small else {"7b": 1}.get(name, 8)
        method, bits = METHODS[which.split(",", maxsplit=1)[0]], 8 if IN_INT8 in which else 16
        training = Training(
            name=which,
            method=replace(method, weight_bits=bits, recomputes=RECOMPUTING in which),
            size=size,
            tokens=sequences * size.sequence,
            batch=sequences,
            device=session.device,
        )
        session.try_row(f"{name}, {which}", training.figures, needs_s=TRAINING_S.get(name, 8.0))


def measure(session: Session) -> None:
    """Report each optimizer's step on each model, the most telling first."""
    for name, size in session.sizes.items():
        for which, method in OPTIMIZERS.items():
            if name.startswith("tiny") and method.weight_bits == 8:
                continue  # its slices are the point, and there are none
            one = OptimizerStep(method=method, size=replace(size, gap=RARELY), device=session.device)
            measured: Callable[[], Figures] = one.figures
            if method.peer:
                measured = partial(_of_peer, session, which, one, session.peers / method.peer.name)
            session.try_row(f"{name}, {which}", measured, needs_s=STEP_S.get(name, 5.0))
            del one, measured  # its tensors


def _of_peer(session: Session, which: str, one: OptimizerStep, folder: Path) -> Figures:
    """The figures of a published optimizer, from a process that imports it in place of ours."""
    if not folder.is_dir():
        return {"left out": f"no folder {folder.name}"}
    with one.start(which, folder) as worker:
        return worker.ask("figures", within_s=min(PEER_S, max(session.left_s, 1)))


def measure_staggered(session: Session) -> None:
    """Report the median and the worst of the staggered steps, by the defaults."""
    for name, size in session.sizes.items():
        if name in ("350m", "1b"):
            session.try_row(name, partial(_staggered, session, size), needs_s=15)


def _staggered(session: Session, size: Llama) -> Figures:
    clear(session.device)
    one = OptimizerStep(method=OPTIMIZERS["galore"], size=size, device=session.device, stagger=True)
    for _ in range(3):
        one.step()
    seconds: list[float] = []
    while len(seconds) < (20 if session.small else STAGGERED_STEPS) and session.left_s > 0:
        seconds.append(one.step()["step_s"])
    worst, middle = max(seconds), median(seconds)
    times = {"median_ms": 1e3 * middle, "worst_ms": 1e3 * worst, "worst_over_median": worst / middle}
    return {"steps": len(seconds), **times, "shortest_ms": 1e3 * min(seconds)}
