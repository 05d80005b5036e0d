"""Counting where the host waits for the device."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default}


class Reading(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations that would read back from a device, where there is none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING:
            self.seen.append(str(func))
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
        with Reading() as reading:
            yield seen
        seen += reading.seen
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
