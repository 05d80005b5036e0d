"""Time on a device, by its own clock and by the host's; on a CPU both are one."""

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any, TypeVar
from unittest import mock

import torch

from benchmarks.common.memory import GIB, Footprint, clear

Call = Callable[[], object]
Running = TypeVar("Running")


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
        before and after it.
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
    return {name: median(values) for name, values in all_ms.items()}


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
        if event.device_type == DeviceType.CUDA:
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
