"""The machine that a run is on: what it asks of it (one process, one GPU, trackers), what it is, and memory taken."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from rich.console import Console
from transformers.integrations.integration_utils import get_available_reporting_integrations


def require_one_process() -> None:
    """Refuse a launcher of many processes with a ValueError."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ValueError(f"WORLD_SIZE = {processes}: a run is one process; start it without a launcher.")


_ACCELERATE = "ACCELERATE_"
_OFF = ("", "0", "1", "no", "false")  # what a launcher of one process says of what is not asked for


def ignore_accelerate(console: Console) -> None:
    """Take away what Accelerate would read from the environment: all that decides a run is in its settings.

    Otherwise ``ACCELERATE_MIXED_PRECISION``, say, which a launcher or a shell has left, trains in another precision.

    Args:
        console: where what asks for something is told.
    """
    found = {name: os.environ.pop(name) for name in sorted(os.environ) if name.startswith(_ACCELERATE)}
    asking = [f"{name} = {value!r}" for name, value in found.items() if value.lower() not in _OFF]
    if asking:
        console.print(
            f"{', '.join(asking)} has no effect: a run's settings decide.",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )


def trackers(report_to: str) -> list[str]:
    """The trackers that are to be reported to.

    Args:
        report_to: their names, by comma; ``none`` is none.

    Raises:
        ValueError: when one is not installed.
    """
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    available: list[str] = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    for name in names:
        if name not in available:
            raise ValueError(
                f"report_to = {name!r} is not installed or not known to Transformers; install it, or choose from: "
                f"none{''.join(', ' + each for each in available)}."
            )
    return names


def peak_memory_bytes() -> int:
    """The most memory taken so far: on the GPU if there is one, in the whole process otherwise.

    >>> peak_memory_bytes() > 0
    True
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux that of a new process begins with the memory of the one that started it.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024  # given in KiB
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # Unix alone has it, where psutil knows no peak

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions(libraries: tuple[str, ...] = ()) -> dict[str, str]:
    """What the runs were made with: versions, and the processors' names.

    Args:
        libraries: told beside torch and Transformers.
    """
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", *libraries, "galore-torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # noqa: PERF203
            found[name] = "not installed as a package"
    return {**found, "processor": _processor(), **_gpu()}


def _gpu() -> dict[str, str]:
    return {"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
