"""How much memory this process takes: now, and at most since it was last asked to forget.

On a GPU it is what torch has allocated there. On a CPU it is the resident set of the whole process, as the Linux
kernel counts it, so that no allocation escapes, whoever makes it.
"""

import ctypes
import gc
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

GIB = 2**30
MIB = 2**20
AT_ONCE_BYTES = 2**16
"""Pieces of memory that `give_back_at_once` lets the C library return singly."""

_STATUS, _FORGET, _MEMORY = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class Footprint:
    """The memory of this process on a device (cpu or cuda) above `base_bytes`, what it takes when this object is made.

    Raises:
        RuntimeError: the system does not tell; only Linux does, for a CPU.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        if not self._cuda and not _FORGET.exists():
            raise RuntimeError(f"{_FORGET} is needed to measure a process's peak memory on a CPU: run this on Linux")
        gc.collect()
        libc = ctypes.CDLL(None)
        if not self._cuda and hasattr(libc, "malloc_trim"):  # glibc's; others return memory by themselves
            libc.malloc_trim(0)  # what building the model left behind would hide as much of the peak
        self.base_bytes = 0
        self.base_bytes = self.taken_bytes()
        self.forget()

    def highest_bytes(self) -> int:
        """Return the most that was taken since `forget`, what was there before included."""
        return self.base_bytes + self.peak_bytes()

    def forget(self) -> None:
        """Let the peak start from what is taken now."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            _FORGET.write_text("5")

    def taken_bytes(self) -> int:
        """Return what is taken now, above `base_bytes`."""
        return (torch.cuda.memory_allocated() if self._cuda else _kernel_says("VmRSS")) - self.base_bytes

    def peak_bytes(self) -> int:
        """Return the most that was taken since `forget`, above `base_bytes`."""
        peak = torch.cuda.max_memory_allocated() if self._cuda else _kernel_says("VmHWM")
        return peak - self.base_bytes


def _kernel_says(key: str, file: Path = _STATUS) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", file.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{file} has no {key}")
    return int(found[1]) * 1024


def available_bytes(device: str) -> int:
    """Return the memory that can still be taken, by any process."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else _kernel_says("MemAvailable", _MEMORY)


def give_back_at_once() -> None:
    """Let the C library return memory from now on as soon as it is freed, as far as it can (glibc's)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            libc.mallopt(parameter, AT_ONCE_BYTES)


def stored_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Return what tensors store. One of another kind counts with the plain tensors in it, or with nothing.

    >>> stored_bytes([torch.zeros(4), None])
    16
    """
    total = 0
    for tensor in (one for one in tensors if one is not None):
        if type(tensor) in (Tensor, torch.nn.Parameter):
            total += tensor.untyped_storage().nbytes()
        elif hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            total += stored_bytes(getattr(tensor, name) for name in names)
    return total


def tensors_alive() -> list[Tensor]:
    """Return every tensor with memory that Python holds anywhere in this process: a compiler's stand-ins have none."""
    gc.collect()
    kinds = {type(thing) for thing in gc.get_objects() if issubclass(type(thing), Tensor)}
    real = {kind for kind in kinds if not kind.__module__.startswith("torch._subclasses.")}
    return [thing for thing in gc.get_objects() if type(thing) in real]


def held_bytes(known: list[Tensor]) -> dict[str, float]:
    """Return the bytes of all storages alive in this process but those of the `known` tensors.

    Storages are counted, not tensors: a view that keeps a larger tensor alive weighs what it keeps. Step counters and
    other single numbers (8 bytes and less) are counted apart as "counters".
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_alive()}
    for tensor in known:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    counters = sum(nbytes for nbytes in storages.values() if nbytes <= 8)
    return {"state": sum(storages.values()) - counters, "counters": counters}


def clear(device: str) -> None:
    """Free what nobody holds."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
