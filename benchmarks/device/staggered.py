"""The steps of a run in which layers take turns to renew: none may take much longer than the others."""

from functools import partial
from statistics import median

from benchmarks.common.memory import clear
from benchmarks.common.optimizers import weights_with_gradients
from benchmarks.common.sizes import Llama
from benchmarks.common.timing import seconds_of
from benchmarks.device.session import Figures, Session
from benchmarks.device.sizes import sizes
from galore_torch import GaLoreAdamW

STEPS = 400


def measure(session: Session) -> None:
    """Tell the median and the worst of the steps, by the defaults."""
    for name, size in sizes(session.small).items():
        if name in ("350m", "1b"):
            session.try_row(name, partial(_steps_of, session, size), needs_s=15)


def _steps_of(session: Session, size: Llama) -> Figures:
    clear(session.device)
    weights = weights_with_gradients(size.weights, device=session.device)
    optimizer = GaLoreAdamW([{"params": weights, "rank": size.rank, "update_proj_gap": size.gap}], lr=1e-3)
    for _ in range(3):
        optimizer.step()
    seconds: list[float] = []
    while len(seconds) < (20 if session.small else STEPS) and session.left_s > 0:
        seconds.append(seconds_of(optimizer.step, session.device))
    worst, middle = max(seconds), median(seconds)
    return {
        "steps": len(seconds),
        "median_ms": 1e3 * middle,
        "worst_ms": 1e3 * worst,
        "worst_over_median": worst / middle,
        "shortest_ms": 1e3 * min(seconds),
    }
