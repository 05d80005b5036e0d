"""Whether training on the device is right, and waits for nothing: small networks in each recipe and mode.

Each is held against float64 on the CPU, and so is what else must hold. How often the host waits for the device in a
step is told too, and where: in ordinary steps it ought to, never.
"""

import io
import re
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import galore_torch
from benchmarks.common.report import limits
from benchmarks.device.session import Figures, Row, Session
from galore_torch import GaLore
from galore_torch.projection import find_bases

Make = Callable[[list[dict[str, Any]]], GaLore]
Mode = tuple[str, ...]
MODES: dict[str, Mode] = {
    "step()": (),
    "projected": ("projected",),
    "fused": ("fused",),
    "full, in the backward": ("full", "backward"),
    "fused, in the backward": ("fused", "backward"),
}
"""What `attach` gets after model and optimizer; nothing is attached for the first."""


def net() -> nn.Module:
    """Three projected layers with a head that is not; the same numbers at every call."""
    torch.manual_seed(0)
    sizes = ((48, 96), (96, 48), (48, 48))
    mlp = nn.Sequential(*(layer for size in sizes for layer in (nn.Linear(*size), nn.Tanh())))
    return nn.Sequential(OrderedDict(mlp=mlp, head=nn.Linear(48, 32)))


def batches(model: nn.Module, steps: Iterable[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of these steps in the model's dtype and on its device, drawn on the CPU in float64."""
    like = next(model.parameters())
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        drawn = (torch.randn(64, size, generator=generator, dtype=torch.float64) for size in (48, 32))
        x, y = (one.to(like.device, like.dtype) for one in drawn)
        yield x, y


def build(
    make: Make, device: str, dtype: torch.dtype, mode: Mode = (), *, in_int8: bool = False, **keys: Any
) -> tuple[nn.Module, GaLore]:
    """Return the network and its optimizer, attached in a mode; keys are those of the projected group."""
    model = net().to(device, dtype)
    if in_int8:
        galore_torch.quantize_weights(model, "all-linear")
    optimizer = make(galore_torch.param_groups(model, **{"rank": 6, **keys}))
    if mode:
        galore_torch.attach(model, optimizer, *mode)  # type: ignore[arg-type]
    return model, optimizer


def train(model: nn.Module, optimizer: GaLore, steps: Iterable[int]) -> None:
    """Make these steps."""
    for x, y in batches(model, steps):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def flat(model: nn.Module) -> Tensor:
    """All weights in one vector of float64 on the CPU."""
    return torch.cat([weight.detach().cpu().double().flatten() for weight in model.parameters()])


STEPS = 12
ONCE: dict[str, Any] = {"update_proj_gap": 10**6, "decomposition": "svd", "saved": (1, "cpu", ())}
"""The first step and its bases on the CPU, the others on the device from that state."""
AUTOCAST = "fp16 autocast, loss scaler, clipping"
PRESET_TABLE: dict[str, Make] = {
    "AdamW": partial(galore_torch.GaLoreAdamW, lr=1e-2, weight_decay=0.1),
    "SGD": partial(galore_torch.GaLoreSGD, lr=1e-1, momentum=0.9, weight_decay=0.1),
    "Adafactor": partial(galore_torch.GaLoreAdafactor, lr=1e-2),
    "RMSprop": partial(GaLore, optimizer_class=torch.optim.RMSprop, lr=1e-2),
    "Muon": partial(GaLore, optimizer_class=torch.optim.Muon, fallback_class=torch.optim.AdamW, lr=1e-2),
}
_FEW_BITS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "min_8bit_size": 256}
IN_FEW_BITS: dict[str, tuple[Make, dict[str, Any]]] = {
    "AdamW8bit": (partial(galore_torch.GaLoreAdamW8bit, **_FEW_BITS), {}),
    "QGaLoreAdamW8bit": (partial(galore_torch.QGaLoreAdamW8bit, **_FEW_BITS), {}),
    "AdamW, bases in 8 bits": (PRESET_TABLE["AdamW"], {"basis_bits": 8}),
    "AdamW, INT8 weights": (PRESET_TABLE["AdamW"], {"in_int8": True}),
}
Walk = Callable[[Mode, str], Tensor]
"""Trains for some steps in a mode on a device, and returns all weights."""


def correctness(session: Session) -> Iterator[Row]:
    """Yield the relative error of each recipe and mode after some steps, and what else must hold."""
    for row, walk, expected, limit in _walks():
        modes = {name: mode for name, mode in MODES.items() if row != AUTOCAST or "backward" not in mode}
        yield row, partial(_compared, walk, expected, limits("correctness")[limit], modes, session.device), 0
    for row, check in CHECKS.items():
        yield row, partial(check, session.device), 0


def _walks() -> Iterator[tuple[str, Walk, Walk, str]]:
    """Yield rows: what is trained, what it must come to on the CPU, and the key of how far it may be away from that."""
    for name, make in PRESET_TABLE.items():
        for what, saved in (("one basis", ONCE), ("renewing", {})):
            walk = partial(_walk, make, **saved)
            yield f"{name}, float64, {what}", walk, walk, what
    adamw = partial(_walk, PRESET_TABLE["AdamW"])
    yield "AdamW, float32, renewing", partial(adamw, dtype=torch.float32), adamw, "float32"
    yield AUTOCAST, partial(adamw, dtype=torch.float32, train=_train_in_fp16), adamw, "few bits"
    for name, (make, keys) in IN_FEW_BITS.items():
        yield name, partial(_walk, make, dtype=torch.float32, **keys), adamw, "few bits"


def _compared(walk: Walk, expected: Walk, at_most: float, modes: Mapping[str, Mode], device: str) -> Figures:
    right, start = _expected(expected), flat(net().double())
    errors = {name: float((walk(mode, device) - right).norm() / (right - start).norm()) for name, mode in modes.items()}
    return {"right": max(errors.values()) <= at_most, **errors}


@cache
def _expected(walk: Walk) -> Tensor:
    """What a training comes to on the CPU: many rows expect the same one."""
    return walk((), "cpu")


def _walk(
    make: Make,
    mode: Mode,
    device: str,
    dtype: torch.dtype = torch.float64,
    *,
    train: Callable[[nn.Module, GaLore, Iterable[int]], None] = train,
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


def _train_in_fp16(model: nn.Module, optimizer: GaLore, steps: Iterable[int]) -> None:
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


WAITING_STEPS = 16
GAPS = {"ordinary": 10**6, "staggered": 6}
"""Steps between renewals. Of the latter, three layers that take turns: half of the steps renew one."""
LAZY = {"cos_threshold": 0.4, "queue_size": 2}
KINDS: dict[str, tuple[Make, Mode, dict[str, Any]]] = {
    **{f"AdamW, {name}": (PRESET_TABLE["AdamW"], mode, {}) for name, mode in MODES.items()},
    **{f"{name}, step()": (make, (), {}) for name, make in PRESET_TABLE.items() if name != "AdamW"},
    **{f"{name}, fused": (make, MODES["fused"], keys) for name, (make, keys) in IN_FEW_BITS.items()},
    "AdamW, lazy": (PRESET_TABLE["AdamW"], (), LAZY),
}
aten = torch.ops.aten
READING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default}


def waiting(session: Session) -> Iterator[Row]:
    """Yield for each recipe and mode in how many of some steps the host waits, how often, and where first."""
    for name, kind in KINDS.items():
        yield name, partial(_waits_of, session.device, *kind), 0


def _waits_of(device: str, make: Make, mode: Mode, keys: dict[str, Any]) -> Figures:
    figures: Figures = {}
    for label, gap in GAPS.items():
        model, optimizer = build(make, device, torch.float32, mode, update_proj_gap=gap, **keys)
        train(model, optimizer, range(4))
        places, steps = Counter[str](), 0
        for x, y in list(batches(model, range(4, 4 + WAITING_STEPS))):
            with waits(device) as backward:
                (model(x) - y).square().mean().backward()
            with waits(device) as step:
                optimizer.step()
            optimizer.zero_grad()
            places.update(f"backward: {where}" for where in backward)
            places.update(f"step: {where}" for where in step)
            steps += bool(backward or step)
        figures[f"{label}: steps of {WAITING_STEPS} that wait"] = steps
        figures[f"{label}: waits"] = places.total()
        figures[f"{label}: where"] = [f"{place} x{times}" for place, times in places.most_common(4)]
    return figures


class _Reading(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations that would read back from a device, where there is none."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING:
            self._seen.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def waits(device: str) -> Iterator[list[str]]:
    """Note each time that the host waits for the device, with the line of Python that it happens in.

    On a GPU by torch's own debug mode; on a CPU by the operations that read a number from a tensor.

    Args:
        device: "cuda" or "cpu".

    Yields:
        A list, filled when the block ends.
    """
    seen: list[str] = []
    if device != "cuda":
        with _Reading(seen):
            yield seen
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waited = [one for one in caught if re.search("synchronizing CUDA operation", str(one.message))]
    seen += ["/".join(Path(one.filename).parts[-2:]) + f":{one.lineno}" for one in waited]
