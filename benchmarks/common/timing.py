"""Time on a device, by its own clock and by the host's; on a CPU both are one."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, TypeVar

import torch

Call = Callable[[], object]
Running = TypeVar("Running")


def drain(device: str) -> None:
    """Wait until the device has done all that it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def now_s(device: str) -> float:
    """The time when the device has done all that it was told."""
    drain(device)
    return time.perf_counter()


def seconds_of(call: Call, device: str) -> float:
    """Seconds of one call, the device drained before and after."""
    start = now_s(device)
    call()
    return now_s(device) - start


def in_turn(those: list[Running], rounds: int) -> Iterator[Running]:
    """Yield everyone once a round, each round started by another."""
    for number in range(rounds):
        start = number % len(those)
        yield from those[start:] + those[:start]


def timed(call: Call, device: str, *, times: int = 5, warm: int = 1) -> dict[str, float]:
    """Median milliseconds of a call.

    Args:
        call: What is timed.
        device: Where it runs.
        times: How often.
        warm: Calls before, which nobody counts.

    Returns:
        `wall_ms` until the device has done it, `host_ms` until the call returns, and `device_ms` between the events
        before and after it.
    """
    for _ in range(warm):
        call()
    wall, host, on_device = [], [], []
    for _ in range(times):
        drain(device)
        events = _events() if device == "cuda" else []
        for event in events[:1]:
            event.record()
        start = time.perf_counter()
        call()
        host.append(time.perf_counter() - start)
        for event in events[1:]:
            event.record()
        drain(device)
        wall.append(time.perf_counter() - start)
        on_device.append(events[0].elapsed_time(events[1]) / 1e3 if events else wall[-1])
    return {f"{name}_ms": 1e3 * median(of) for name, of in (("wall", wall), ("host", host), ("device", on_device))}


def _events() -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]


def kernels(call: Call, device: str) -> dict[str, Any]:
    """What a call launches on a GPU; empty on a CPU.

    Args:
        call: What is traced.
        device: Where it runs.

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
        drain(device)
    count, total_us = Counter[str](), Counter[str]()
    for event in traced.events():
        if event.device_type == DeviceType.CUDA:
            count[event.name] += 1
            total_us[event.name] += event.device_time_total
    longest = [f"{name[:60]} x{count[name]} {us / 1e3:.2f} ms" for name, us in total_us.most_common(5)]
    return {"kernels": count.total(), "kernel_ms": total_us.total() / 1e3, "longest": longest}
