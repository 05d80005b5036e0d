"""How often the host waits for the device in a step, and where: ordinary steps ought to, never."""

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.device.correctness import IN_FEW_BITS, PRESET_TABLE
from benchmarks.device.session import Figures, Session
from benchmarks.device.small_net import MODES, Make, Mode, batches, build, train

STEPS = 16
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


def measure(session: Session) -> None:
    """Report for each recipe and mode in how many of some steps the host waits, how often, and where first."""
    for name, kind in KINDS.items():
        session.try_row(name, partial(_waits_of, session.device, *kind))


def _waits_of(device: str, make: Make, mode: Mode, keys: dict[str, Any]) -> Figures:
    figures: Figures = {}
    for label, gap in GAPS.items():
        model, optimizer = build(make, device, torch.float32, mode, update_proj_gap=gap, **keys)
        train(model, optimizer, range(4))
        places, steps = Counter[str](), 0
        for x, y in list(batches(model, range(4, 4 + STEPS))):
            with waits(device) as backward:
                (model(x) - y).square().mean().backward()
            with waits(device) as step:
                optimizer.step()
            optimizer.zero_grad()
            places.update(f"backward: {where}" for where in backward)
            places.update(f"step: {where}" for where in step)
            steps += bool(backward or step)
        figures[f"{label}: steps of {STEPS} that wait"] = steps
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
