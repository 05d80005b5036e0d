"""The most memory that a process took, for itself alone."""

import sys
from pathlib import Path

import psutil
import torch


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
