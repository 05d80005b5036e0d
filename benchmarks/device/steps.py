"""What `step()` and a renewal cost on all weights of a model, with random gradients, beside other optimizers.

The staggered steps are those of a run in which layers take turns to renew: none may take much longer than the others.
"""

from dataclasses import replace
from functools import partial
from statistics import median

from benchmarks.common.memory import clear
from benchmarks.common.methods import OPTIMIZERS
from benchmarks.common.optimizer_step import RARELY, OptimizerStep
from benchmarks.common.sizes import Llama
from benchmarks.device.session import Figures, Session

NEEDS_S = {"7b": 30.0, "1b": 10.0}
"""Seconds that a row takes, about; others take 5."""
PEER_S = 90.0
"""The most that a process of a published optimizer may take."""
STAGGERED_STEPS = 400


def measure(session: Session) -> None:
    """Report each optimizer's step on each model, the most telling first."""
    for name, size in session.sizes.items():
        for which, method in OPTIMIZERS.items():
            if name.startswith("tiny") and method.weight_bits == 8:
                continue  # its slices are the point, and there are none
            one = OptimizerStep(method=method, size=replace(size, gap=RARELY), device=session.device)
            measured = partial(_of_peer, session, which, one) if method.peer else one.figures
            session.try_row(f"{name}, {which}", measured, needs_s=NEEDS_S.get(name, 5.0))
            del one, measured  # its tensors


def _of_peer(session: Session, which: str, one: OptimizerStep) -> Figures:
    """The figures of a published optimizer, from a process that imports it in place of ours."""
    assert one.method is not None
    assert one.method.peer is not None
    folder = session.peers / one.method.peer.name
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
        seconds.append(one.step()["step"])
    worst, middle = max(seconds), median(seconds)
    figures = {"median_ms": 1e3 * middle, "worst_ms": 1e3 * worst, "worst_over_median": worst / middle}
    return {"steps": len(seconds), **figures, "shortest_ms": 1e3 * min(seconds)}
