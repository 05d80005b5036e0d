"""Whether training on the device is right: each recipe and mode against float64 on the CPU, and what else must hold."""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.report import limits
from benchmarks.device.session import Figures, Session
from benchmarks.device.small_net import MODES, Make, Mode, Net, batches, build, flat, train
from galore_torch import GaLore, GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreSGD, QGaLoreAdamW8bit
from galore_torch.projection import find_bases

STEPS = 12
ONCE: dict[str, Any] = {"update_proj_gap": 10**6, "decomposition": "svd", "saved": (1, "cpu", ())}
"""The first step and its bases on the CPU, the others on the device from that state."""
AUTOCAST = "fp16 autocast, loss scaler, clipping"
PRESET_TABLE: dict[str, Make] = {
    "AdamW": lambda groups: GaLoreAdamW(groups, lr=1e-2, weight_decay=0.1),
    "SGD": lambda groups: GaLoreSGD(groups, lr=1e-1, momentum=0.9, weight_decay=0.1),
    "Adafactor": lambda groups: GaLoreAdafactor(groups, lr=1e-2),
    "RMSprop": lambda groups: GaLore(groups, optimizer_class=torch.optim.RMSprop, lr=1e-2),
    "Muon": lambda groups: GaLore(groups, optimizer_class=torch.optim.Muon, fallback_class=torch.optim.AdamW, lr=1e-2),
}
IN_FEW_BITS: dict[str, tuple[Make, dict[str, Any]]] = {
    "AdamW8bit": (lambda groups: GaLoreAdamW8bit(groups, lr=1e-2, weight_decay=0.1, min_8bit_size=256), {}),
    "QGaLoreAdamW8bit": (lambda groups: QGaLoreAdamW8bit(groups, lr=1e-2, weight_decay=0.1, min_8bit_size=256), {}),
    "AdamW, bases in 8 bits": (PRESET_TABLE["AdamW"], {"basis_bits": 8}),
    "AdamW, INT8 weights": (PRESET_TABLE["AdamW"], {"in_int8": True}),
}
Walk = Callable[[Mode, str], Tensor]
"""Trains for some steps in a mode on a device, and returns all weights."""


def measure(session: Session) -> None:
    """Report the relative error of each recipe and mode after some steps, and of what else must hold."""
    for row, walk, expected, limit in _rows():
        modes = {name: mode for name, mode in MODES.items() if row != AUTOCAST or "backward" not in mode}
        session.try_row(row, partial(_compared, walk, expected, limits("correctness")[limit], modes, session.device))
    for row, check in CHECKS.items():
        session.try_row(row, partial(check, session.device))


def _rows() -> Iterator[tuple[str, Walk, Walk, str]]:
    """Yield rows: what is trained, what it must come to on the CPU, and the key of how far it may be away from that."""
    for name, make in PRESET_TABLE.items():
        once, renewing = partial(_walk, make, **ONCE), partial(_walk, make)
        yield f"{name}, float64, one basis", once, once, "one basis"
        yield f"{name}, float64, renewing", renewing, renewing, "renewing"
    adamw = partial(_walk, PRESET_TABLE["AdamW"])
    yield "AdamW, float32, renewing", partial(adamw, dtype=torch.float32), adamw, "float32"
    yield AUTOCAST, partial(adamw, dtype=torch.float32, train=_train_in_fp16), adamw, "few bits"
    for name, (make, keys) in IN_FEW_BITS.items():
        yield name, partial(_walk, make, dtype=torch.float32, **keys), adamw, "few bits"


def _compared(walk: Walk, expected: Walk, at_most: float, modes: Mapping[str, Mode], device: str) -> Figures:
    right, start = expected((), "cpu"), flat(Net().double())
    errors = {name: float((walk(mode, device) - right).norm() / (right - start).norm()) for name, mode in modes.items()}
    return {"right": max(errors.values()) <= at_most, **errors}


def _walk(
    make: Make,
    mode: Mode,
    device: str,
    dtype: torch.dtype = torch.float64,
    *,
    train: Callable[[Net, GaLore, Iterable[int]], None] = train,
    saved: tuple[int, str, Mode] | None = None,
    **keys: Any,
) -> Tensor:
    """Train from the same random numbers everywhere and return all weights.

    `saved` says after how many steps, on which device and in which mode, the state is saved in a file and loaded again.
    """
    keys = {"update_proj_gap": 4, **keys}
    model, optimizer = build(make, device, dtype, mode, **keys)
    done, first_device, first_mode = saved or (0, device, mode)
    if done:
        before, its = build(make, first_device, dtype, first_mode, **keys)
        train(before, its, range(done))
        file = io.BytesIO()
        torch.save([before.state_dict(), its.state_dict()], file)
        file.seek(0)
        states = torch.load(file, map_location="cpu", weights_only=True)
        model.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
    train(model, optimizer, range(done, STEPS))
    return flat(model)


def _train_in_fp16(model: Net, optimizer: GaLore, steps: Iterable[int]) -> None:
    """In fp16 autocast with a loss scaler and clipping, which trains as float32 does, roughly."""
    device = next(model.parameters()).device.type
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    for x, y in batches(model, steps):
        with torch.autocast(device, torch.float16):
            loss = (model(x) - y).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def _resumed(device: str) -> Figures:
    """A run that is saved, and loaded by way of the CPU, is the same bit for bit."""
    walk = partial(_walk, PRESET_TABLE["AdamW"], device=device, dtype=torch.float32)
    equal = {name: torch.equal(walk(mode), walk(mode, saved=(5, device, mode))) for name, mode in MODES.items()}
    return {"right": all(equal.values()), **equal}


def _same_draws(device: str) -> Figures:
    """A random basis is the CPU's, whatever device it is for."""

    def basis(where: str) -> Tensor:
        return find_bases(torch.zeros(96, 48, device=where), {"left": 8}, "random", seed=1)["left"].cpu()

    error = float((basis("cpu") - basis(device)).abs().max())
    return {"right": error <= 1e-5, "error": error}


def _not_finite(device: str) -> Figures:
    """A gradient that is not finite renews nothing and is counted."""
    model, optimizer = build(PRESET_TABLE["AdamW"], device, torch.float32, update_proj_gap=1)
    train(model, optimizer, range(2))
    before = [one.renewals for one in optimizer.subspaces().values()]
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, float("nan"))
    optimizer.step()
    after, counted = [one.renewals for one in optimizer.subspaces().values()], optimizer.nonfinite_counts()
    return {"right": before == after and set(counted.values()) == {1}, "counted": len(counted)}


CHECKS: dict[str, Callable[[str], Figures]] = {
    "resumed by way of a file": _resumed,
    "random numbers are the CPU's": _same_draws,
    "a gradient that is not finite": _not_finite,
}
