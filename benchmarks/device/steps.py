"""What `step()` and a renewal cost on all weights of a model, with random gradients, beside other optimizers."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

from torch.optim import Optimizer

from benchmarks.common.memory import clear, peak_gib
from benchmarks.common.optimizers import CONTENDERS, RARELY, Contender, weights_with_gradients
from benchmarks.common.peers import importing_from
from benchmarks.common.sizes import Llama
from benchmarks.common.timing import kernels, seconds_of, timed
from benchmarks.common.worker import Worker
from benchmarks.device.session import Figures, Session
from benchmarks.device.sizes import sizes

NEEDS_S = {"7b": 30.0, "1b": 10.0}
"""Seconds that a row takes, about; others take 5."""
WORKER_S = 90.0
"""The most that a process of a published optimizer may take."""


def measure(session: Session) -> None:
    """Tell each optimizer's step on each model, the most telling first."""
    for name, size in sizes(session.small).items():
        for which, contender in CONTENDERS.items():
            if name.startswith("tiny") and contender.in_int8:
                continue  # its slices are the point, and there are none
            one = partial(figures_of, which, size, session.device)
            if contender.peer is not None:
                one = partial(_in_worker, session, which, contender, size)
            session.try_row(f"{name}, {which}", one, needs_s=NEEDS_S.get(name, 5.0))


def figures_of(which: str, size: Llama, device: str) -> Figures:
    """Measure one optimizer on one model.

    Args:
        which: Key of `CONTENDERS`.
        size: The model.
        device: Where.

    Returns:
        `first_s` (of the step that makes state and bases), `renewal_s` (of ours, of all weights from the bases that
        they have), an ordinary step's times, its kernels, and the memory at its highest, weights and gradients too.
    """
    contender = CONTENDERS[which]
    clear(device)
    weights = weights_with_gradients(size.weights, device=device, in_int8=contender.in_int8)
    optimizer = contender.build(weights, rank=size.rank, gap=RARELY, stagger=False)
    figures: Figures = {"first_s": seconds_of(optimizer.step, device)}
    figures |= timed(optimizer.step, device)
    figures["host_us_a_weight"] = 1e3 * figures["host_ms"] / len(weights)
    if contender.ours:
        figures["renewal_s"] = seconds_of(partial(_renewing_step, optimizer), device)
    figures["peak_GiB"] = peak_gib(device)
    traced = kernels(optimizer.step, device)
    if traced:
        figures["kernels_a_weight"] = traced["kernels"] / len(weights)
    return figures | traced


def _renewing_step(optimizer: Optimizer) -> None:
    """One step in which every weight renews its basis."""
    gaps = [group["update_proj_gap"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["update_proj_gap"] = 1
    optimizer.step()
    for group, gap in zip(optimizer.param_groups, gaps, strict=True):
        group["update_proj_gap"] = gap


def _in_worker(session: Session, which: str, contender: Contender, size: Llama) -> Figures:
    """The figures of a published optimizer, from a process that imports it in place of ours."""
    assert contender.peer is not None
    folder = session.peers / contender.peer
    if not folder.is_dir():
        return {"left out": f"no folder {contender.peer}"}
    request = {"which": which, "size": asdict(size), "device": session.device}
    with Worker(which, "benchmarks.device.peer", request, importing_from(folder)) as worker:
        return worker.ask("figures", within_s=min(WORKER_S, max(session.left_s, 1)))
