"""Time and memory on a device: time by its own clock and by the host's, which on a CPU are one; memory at its highest.

On a GPU memory is what torch has allocated there. On a CPU it is the resident set of the whole process, as the Linux
kernel counts it, so that no allocation escapes, whoever makes it.
"""

import ctypes
import functools
import gc
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, TypeVar
from unittest import mock

import psutil
import torch
from torch import Tensor

Call = Callable[[], object]
Running = TypeVar("Running")

GIB = 2**30
MIB = 2**20
AT_ONCE_BYTES = 2**16
"""Pieces of memory that `give_back_at_once` lets the C library return singly."""

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
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
        taken: int = torch.cuda.memory_allocated() if self._cuda else psutil.Process().memory_info().rss
        return taken - self.base_bytes

    def peak_bytes(self) -> int:
        """Return the most that was taken since `forget`, above `base_bytes`."""
        if self._cuda:
            return torch.cuda.max_memory_allocated() - self.base_bytes
        (kib,) = re.findall(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)  # psutil has no peak
        return int(kib) * 1024 - self.base_bytes


def available_bytes(device: str) -> int:
    """Return the memory that can still be taken, by any process."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def give_back_at_once() -> None:
    """Let the C library return memory from now on as soon as it is freed, as far as it can (glibc's)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            libc.mallopt(parameter, AT_ONCE_BYTES)


def stored_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Return what tensors store. One of another kind counts with the plain tensors in it; None with nothing.

    >>> stored_bytes([torch.zeros(4), None])
    16
    """
    total = 0
    for tensor in [one for one in tensors if one is not None]:
        if type(tensor) in (Tensor, torch.nn.Parameter):
            total += tensor.untyped_storage().nbytes()
        elif hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            total += stored_bytes(getattr(tensor, name) for name in names)
        else:
            total += getattr(tensor, "stored_bytes", 0)  # of a weight in INT8
    return total


def tensors_alive() -> list[Tensor]:
    """Return every tensor with memory of its own that Python holds anywhere in this process."""
    gc.collect()
    alive = gc.get_objects()
    kinds = {kind for kind in set(map(type, alive)) if issubclass(kind, Tensor)}
    real = {kind for kind in kinds if not kind.__module__.startswith("torch._subclasses.")}
    return [thing for thing in alive if type(thing) in real and _address(thing)]


def _address(tensor: Tensor) -> int:
    """Return where the storage of a tensor begins, and 0 where it has no memory of its own.

    That is what wraps other tensors (a state in few bits, a weight in parts: what they wrap is alive itself), stands
    for one while a compiler or `torch.func` looks at a function, or has not been initialized. Asking it raises.
    """
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError, ValueError):
        return 0


def held_bytes(known: list[Tensor]) -> dict[str, float]:
    """Return the bytes of all storages alive in this process but those of the `known` tensors.

    Storages are counted, not tensors: a view that keeps a larger tensor alive weighs what it keeps. Step counters and
    other single numbers (8 bytes and less) are counted apart as "counters".
    """
    storages = {_address(tensor): tensor.untyped_storage().nbytes() for tensor in tensors_alive()}
    for tensor in known:
        storages.pop(_address(tensor), None)
    counters = sum(nbytes for nbytes in storages.values() if nbytes <= 8)
    return {"state": sum(storages.values()) - counters, "counters": counters}


def clear(device: str) -> None:
    """Free what nobody holds."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def now_s(device: str) -> float:
    """Wait until the device has done all its work, and return the time in seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(call: Call, device: str) -> float:
    """Seconds of one call, the device drained before and after."""
    start = now_s(device)
    call()
    return now_s(device) - start


def seconds_by_part(parts: Mapping[str, Call], device: str = "cpu") -> dict[str, float]:
    """Run each part once and return its seconds, by its name with _s at the end."""
    return {f"{name}_s": seconds_of(part, device) for name, part in parts.items()}


class Calls:
    """What the calls of a function come to."""

    seconds, count, running = 0.0, 0, 0


@contextmanager
def timed_calls(owner: Any, name: str, within: Calls | None = None) -> Iterator[Calls]:
    """Time the calls of a class's method or a module's function, whoever makes them: all, or those within others."""
    calls, original = Calls(), getattr(owner, name)

    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        if within is not None and not within.running:
            return original(*args, **kwargs)
        calls.running += 1
        start_s = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            calls.seconds += time.perf_counter() - start_s
            calls.count += 1
            calls.running -= 1

    with mock.patch.object(owner, name, timed):
        yield calls


def in_turn(those: list[Running], rounds: int) -> Iterator[Running]:
    """Yield everyone once a round, each round started by another."""
    for number in range(rounds):
        start = number % len(those)
        yield from those[start:] + those[:start]


def timed(call: Call, device: str, *, times: int = 5) -> dict[str, float]:
    """Median milliseconds of a call after one that nobody counts.

    Returns:
        `wall_ms` until the device has done it, `host_ms` until the call returns, and `device_ms` between the events
        before and after it; `least_ms` is the least of the first, for a host that others disturb.
    """
    call()
    all_ms: dict[str, list[float]] = {"wall_ms": [], "host_ms": [], "device_ms": []}
    for _ in range(times):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * (device == "cuda"))]  # type: ignore[no-untyped-call]
        start_s = now_s(device)
        for event in events[:1]:
            event.record()
        call()
        all_ms["host_ms"].append(1e3 * (time.perf_counter() - start_s))
        for event in events[1:]:
            event.record()
        all_ms["wall_ms"].append(1e3 * (now_s(device) - start_s))
        all_ms["device_ms"].append(events[0].elapsed_time(events[1]) if events else all_ms["wall_ms"][-1])
    return {name: median(values) for name, values in all_ms.items()} | {"least_ms": min(all_ms["wall_ms"])}


def kernels(call: Call, device: str) -> dict[str, Any]:
    """What a call launches on a GPU; empty on a CPU.

    Returns:
        `kernels` (how many, copies and fills included), `kernel_ms` (their sum), and `longest` (the five kinds that
        took longest, each with its number and milliseconds).
    """
    if device != "cuda":
        return {}
    from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as traced:
        call()
        now_s(device)
    count, total_us = Counter[str](), Counter[str]()
    for event in traced.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:  # spans, such as an optimizer's step
            count[event.name] += 1
            total_us[event.name] += event.device_time_total
    longest = [f"{name[:60]} x{count[name]} {us / 1e3:.2f} ms" for name, us in total_us.most_common(5)]
    return {"kernels": count.total(), "kernel_ms": total_us.total() / 1e3, "longest": longest}


def step_figures(step: Call, device: str, footprint: Footprint) -> dict[str, Any]:
    """Measure the steps of one that has not stepped yet, as a device is measured.

    Returns:
        `first_s` and `first_peak_GiB` of the first step, which makes all state; times and kernels of ordinary ones, and
        `peak_GiB`. Memory is that at its highest, with what was there before.
    """
    figures = {"first_s": seconds_of(step, device), "first_peak_GiB": footprint.highest_bytes() / GIB}
    clear(device)
    footprint.forget()
    figures |= timed(step, device)
    figures["peak_GiB"] = footprint.highest_bytes() / GIB
    return figures | kernels(step, device)
