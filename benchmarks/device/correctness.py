"""Whether training on the device is right: each recipe and mode against float64 on the CPU, and what else must hold."""

import io
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.bars import limits
from benchmarks.device.session import Figures, Session
from benchmarks.device.small_net import MODES, Make, Mode, Net, batches, build, flat, train
from galore_torch import GaLore, GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreSGD, QGaLoreAdamW8bit, attach
from galore_torch.projection import find_bases

STEPS = 12
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

    def compare(row: str, walk: Walk, expected: Walk, limit: str, modes: Iterable[str] = MODES) -> None:
        session.try_row(row, partial(_compared, walk, expected, limit, modes, session.device))

    for name, make in PRESET_TABLE.items():
        walks: list[Walk] = [partial(_one_basis, make), partial(_renewing, make)]
        compare(f"{name}, float64, one basis", walks[0], walks[0], "one basis")
        compare(f"{name}, float64, renewing", walks[1], walks[1], "renewing")
    adamw = partial(_renewing, PRESET_TABLE["AdamW"])
    compare("AdamW, float32, renewing", partial(adamw, dtype=torch.float32), adamw, "float32")
    for name, (make, keys) in IN_FEW_BITS.items():
        compare(name, partial(_renewing, make, dtype=torch.float32, **keys), adamw, "few bits")
    modes = ("step()", "projected", "fused")
    compare("fp16 autocast, loss scaler, clipping", _autocast, adamw, "few bits", modes)
    for name, check in CHECKS.items():
        session.try_row(name, partial(check, session.device))


def _compared(walk: Walk, expected: Walk, limit: str, modes: Iterable[str], device: str) -> Figures:
    right, start = expected((), "cpu"), flat(Net().double())
    errors = {name: float((walk(MODES[name], device) - right).norm() / (right - start).norm()) for name in modes}
    return {"right": max(errors.values()) <= limits("correctness")[limit], **errors}


def _one_basis(make: Make, mode: Mode, device: str) -> Tensor:
    """The first step and its bases on the CPU, the others on the device from that state."""
    model, optimizer = build(make, "cpu", torch.float64, update_proj_gap=10**6, decomposition="svd")
    train(model, optimizer, [0])
    moved, other = build(make, device, torch.float64, update_proj_gap=10**6, decomposition="svd")
    moved.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    if mode:
        attach(moved, other, *mode)  # type: ignore[arg-type]
    train(moved, other, range(1, STEPS))
    return flat(moved)


def _renewing(make: Make, mode: Mode, device: str, dtype: torch.dtype = torch.float64, **keys: Any) -> Tensor:
    """All of it on the device, bases and their renewals too; they start from the same random numbers everywhere."""
    model, optimizer = build(make, device, dtype, mode, update_proj_gap=4, **keys)
    train(model, optimizer, range(STEPS))
    return flat(model)


def _autocast(mode: Mode, device: str) -> Tensor:
    """In fp16 autocast with a loss scaler and clipping, which trains as float32 does, roughly."""
    model, optimizer = build(PRESET_TABLE["AdamW"], device, torch.float32, mode, update_proj_gap=4)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    for x, y in batches(model, range(STEPS)):
        with torch.autocast(device, torch.float16):
            loss = (model(x) - y).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return flat(model)


def _resumed(device: str) -> Figures:
    """A run that is saved, and loaded by way of the CPU, is the same bit for bit."""
    equal = {}
    for name, mode in MODES.items():
        model, optimizer = build(PRESET_TABLE["AdamW"], device, torch.float32, mode, update_proj_gap=4)
        train(model, optimizer, range(5))
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        train(model, optimizer, range(5, STEPS))
        file.seek(0)
        saved = torch.load(file, weights_only=True, map_location="cpu")
        again, other = build(PRESET_TABLE["AdamW"], device, torch.float32, mode, update_proj_gap=4)
        again.load_state_dict(saved["model"])
        other.load_state_dict(saved["optimizer"])
        train(again, other, range(5, STEPS))
        equal[name] = bool(torch.equal(flat(model), flat(again)))
    return {"right": all(equal.values()), **equal}


def _same_draws(device: str) -> Figures:
    """A random basis is the CPU's, whatever device it is for."""
    matrix = torch.zeros(96, 48)
    bases = [
        find_bases(matrix.to(where), {"left": 8}, "random", generator=torch.Generator().manual_seed(1))["left"]
        for where in ("cpu", device)
    ]
    error = float((bases[0] - bases[1].cpu()).abs().max())
    return {"right": error <= 1e-5, "error": error}


def _not_finite(device: str) -> Figures:
    """A gradient that is not finite renews nothing and is counted."""
    model, optimizer = build(PRESET_TABLE["AdamW"], device, torch.float32, update_proj_gap=1)
    train(model, optimizer, range(2))
    before = {name: one.renewals for name, one in optimizer.subspaces().items()}
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, float("nan"))
    optimizer.step()
    after = {name: one.renewals for name, one in optimizer.subspaces().items()}
    counted = optimizer.nonfinite_counts()
    return {"right": before == after and set(counted.values()) == {1}, "counted": len(counted)}


CHECKS: dict[str, Callable[[str], Figures]] = {
    "resumed by way of a file": _resumed,
    "random numbers are the CPU's": _same_draws,
    "a gradient that is not finite": _not_finite,
}
