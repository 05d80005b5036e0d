"""What the machine can do at most, what a renewal is made of, and what steps and trainings cost, one row a time."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.common.cases import RARELY, OptimizerStep, Training
from benchmarks.common.floor import weights_with_gradients
from benchmarks.common.measuring import clear, kernels, timed
from benchmarks.common.methods import LEARNING_RATE, METHODS, OPTIMIZERS, REFERENCE
from benchmarks.common.sizes import Llama
from benchmarks.device.correctness import waits
from benchmarks.device.session import Figures, Row, Session
from galore_torch import GaLore
from galore_torch.projection import find_bases
from galore_torch.projection.orthonormal import cholesky_qr, leading_by_cholesky

OVERSAMPLED = 16
STEP_S = {"7b": 30.0, "1b": 10.0}
TRAINING_S = {"7b": 45.0, "1b": 15.0}
"""Seconds that a row of `step()`, and of whole steps, takes, about; others take 5, and 8; compiling blocks 30 more."""
PEER_S = 90.0
"""The most that a process of a published optimizer may take."""
STAGGERED_STEPS = 400

LEAST = ("galore-8bit" if find_spec("bitsandbytes") else "galore") + "-per-layer/fused"
RECOMPUTING, IN_INT8, COMPILED = ", activations recomputed", ", INT8 weights", ", blocks compiled"
MODES = [REFERENCE, "galore/fused", "galore-per-layer/fused", "galore/full", "galore/projected"]
PLAN: list[tuple[str, list[str]]] = [
    ("350m", [*MODES, "galore-per-layer/full"]),
    ("7b", [LEAST + RECOMPUTING, LEAST + IN_INT8 + RECOMPUTING]),
    ("1b", MODES),
    ("350m", [REFERENCE + COMPILED, "galore/fused" + COMPILED, "galore-per-layer/fused" + IN_INT8, LEAST]),
    ("7b", ["galore-per-layer/fused", REFERENCE + RECOMPUTING]),
]
"""What is trained, the most telling first: what comes after the time is up is left out."""


def ceilings(session: Session) -> Iterator[Row]:
    """Yield what runs, the copy in TB/s (bytes read and written) and matrix products in TFLOP/s."""
    device = session.device
    about: Figures = {"device": "CPU", "torch": torch.__version__, "python": sys.version.split()[0]}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        about |= {"device": card.name, "multiprocessors": card.multi_processor_count}
        about |= {"memory GiB": round(card.total_memory / 2**30, 1)}
    yield "machine", lambda: about, 0

    def rate(unit: str, work: float, call: Callable[[], Tensor]) -> Figures:
        return {unit: work / timed(call, device, times=10)["device_ms"] / 1e9}

    elements, side = (2**16, 64) if session.small else (2**30, 8192)
    source = torch.zeros(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    yield "copy", partial(rate, "TB/s", 2 * source.nbytes, partial(target.copy_, source)), 0
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.randn(side, side, device=device).to(dtype)
        product = partial(torch.mm, matrix, matrix)
        yield f"product {side} {str(dtype)[6:]}", partial(rate, "TFLOP/s", 2 * side**3, product), 0


def factorizations(session: Session) -> Iterator[Row]:
    """Yield the time of a renewal's products and factorizations, and of what could take their place.

    They are of the shapes of the models; bases are told with how orthonormal and how good they are.
    """
    for name, size in session.sizes.items():
        if name.startswith("tiny"):
            continue  # there is nothing to compute
        for rows, columns in sorted({(min(shape), max(shape)) for shape in size.weights}):
            clear(session.device)
            # Singular values that fall as those of gradients do.
            fall = torch.arange(1, rows + 1, device=session.device).pow(-0.7)
            grad = torch.randn(rows, rows, device=session.device) * fall
            grad = (grad @ torch.randn(rows, columns, device=session.device)).bfloat16()
            for piece, call in _pieces(grad, size.rank).items():
                row = f"{name} {rows} x {columns} rank {size.rank}, {piece}"
                yield row, partial(_found, session.device, call, grad), 2


def _pieces(grad: Tensor, rank: int) -> dict[str, Callable[[], Tensor]]:
    rows = len(grad)
    start = torch.randn(rows, min(rank + OVERSAMPLED, rows), device=grad.device)
    power = grad.float() @ (grad.float().mT @ start)
    gram = power.mT @ power

    def basis(how: str, old: dict[str, Tensor] | None = None) -> Tensor:
        return find_bases(grad, {"left": rank}, how, seed=0, old=old)["left"]

    old = {"left": basis("warm")}
    pieces: dict[str, Callable[[], Tensor]] = {
        "two products in bf16": lambda: grad @ (grad.mT @ start.bfloat16()),
        "Householder QR": lambda: torch.linalg.qr(power).Q,
        "Cholesky QR": lambda: cholesky_qr(power),
        "eigh": lambda: torch.linalg.eigh(gram).eigenvectors,
        "Cholesky LR": lambda: leading_by_cholesky(gram, rank),
        "first basis": lambda: basis("warm"),
        "renewed basis": lambda: basis("warm", old),
        "random basis": lambda: basis("random"),
    }
    if rows <= 1024:
        stack = power.expand(4, -1, -1).contiguous()
        pieces |= {
            "svd": lambda: basis("svd"),
            "Householder QR of 4 stacked": lambda: torch.linalg.qr(stack).Q,
            "Cholesky QR of 4 stacked": lambda: cholesky_qr(stack),
            "eigh of 4 stacked": lambda: torch.linalg.eigh(gram.expand(4, -1, -1)).eigenvectors,
        }
    return pieces


def _found(device: str, call: Callable[[], Tensor], grad: Tensor) -> Figures:
    figures: Figures = timed(call, device, times=3)
    with waits(device) as seen:
        found = call()
    figures["waits"] = len(seen)
    if found.dim() == 2 and found.shape[0] == grad.shape[0] and found.dtype == torch.float32:
        identity = torch.eye(found.shape[1], device=found.device)
        figures["from orthonormal"] = float((found.mT @ found - identity).norm())
        figures["energy"] = float(((found.mT @ grad.float()).norm() / grad.float().norm()).square())
    return figures


def training(session: Session) -> Iterator[Row]:
    """Yield the figures of each model trained in each way."""
    for name, which in ((name, which) for name, methods in PLAN for which in methods if name in session.sizes):
        size, sequences = session.sizes[name], 2 if session.small else {"7b": 1}.get(name, 8)
        method, bits = METHODS[which.split(",", maxsplit=1)[0]], 8 if IN_INT8 in which else 16
        trained = Training(
            name=which,
            method=replace(method, weight_bits=bits, recomputes=RECOMPUTING in which, compiles=COMPILED in which),
            size=size,
            tokens=sequences * size.sequence,
            batch=sequences,
            device=session.device,
        )
        needs_s = TRAINING_S.get(name, 8.0) + 30.0 * trained.method.compiles
        yield f"{name}, {which}", trained.figures, needs_s


def steps(session: Session) -> Iterator[Row]:
    """Yield each optimizer's `step()` and a renewal on all weights of each model, the most telling first."""
    for name, size in session.sizes.items():
        for which, method in OPTIMIZERS.items():
            if name.startswith("tiny") and method.weight_bits == 8:
                continue  # its slices are the point, and there are none
            if session.small and name != "350m" and method.peer:
                continue  # a process is started to import it, which takes longer than all other rows
            one = OptimizerStep(method=method, size=replace(size, gap=RARELY), device=session.device)
            folder = session.peers / method.peer.name if method.peer else None
            yield f"{name}, {which}", partial(_of_step, session, which, one, folder), STEP_S.get(name, 5.0)
            if which == "galore" and session.device == "cuda":
                yield f"{name}, galore, a CUDA graph", partial(_replayed, one.size), STEP_S.get(name, 5.0)


def _of_step(session: Session, which: str, one: OptimizerStep, folder: Path | None) -> Figures:
    """The figures of an optimizer; of a published one from a process that imports it in place of ours."""
    if folder is None:
        return replace(one).figures()  # whose tensors go with it
    if not folder.is_dir():
        return {"left out": f"no folder {folder.name}"}
    with one.start(which, folder) as worker:
        return worker.ask("figures", within_s=min(PEER_S, max(session.left_s, 1)))


def _replayed(size: Llama) -> Figures:
    """The figures of an ordinary step that was captured in a CUDA graph."""
    clear("cuda")
    weights = weights_with_gradients(size.weights, torch.bfloat16, "cuda")
    groups = [{"params": weights, "rank": size.rank, "update_proj_gap": size.gap}]
    lr = torch.tensor(LEARNING_RATE, device="cuda")
    optimizer = GaLore(groups, torch.optim.AdamW, lr=lr, fused=True, capturable=True)
    for _ in range(3):  # the first finds the bases, the next one reads how that went
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return timed(graph.replay, "cuda") | kernels(graph.replay, "cuda")


def staggered(session: Session) -> Iterator[Row]:
    """Yield the median and the worst of steps in which layers take turns to renew: none may take much longer."""
    for name, size in session.sizes.items():
        if name in ("350m", "1b"):
            yield name, partial(_staggered, session, size), 15


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
    later = seconds[len(seconds) // 2 :]  # libraries have loaded by then what they need for each shape
    times["later_worst_over_median"] = max(later) / median(later)
    return {"steps": len(seconds), **times, "shortest_ms": 1e3 * min(seconds)}
