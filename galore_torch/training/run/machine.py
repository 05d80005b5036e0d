"""The machine that a run is on: what it is, its trackers, and the memory that the run takes and was planned to take."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast

import psutil
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional
from transformers import Trainer

from galore_torch import devices
from galore_torch.memory import plan
from galore_torch.training.run import optimizers, processes
from galore_torch.training.run.job import Job
from galore_torch.units import readable

_ACCELERATE = "ACCELERATE_"
_ROWS = 1000  # among which the longest are looked for, to plan by
_OFF = ("", "0", "1", "no", "false")  # what a launcher of one process says of what is not asked for


def ignore_accelerate(console: Console) -> None:
    """Take away what Accelerate would read from the environment, and say what of it asked for something.

    Otherwise ``ACCELERATE_MIXED_PRECISION``, say, which a launcher or a shell has left, trains in another precision.
    """
    found = {name: os.environ.pop(name) for name in sorted(os.environ) if name.startswith(_ACCELERATE)}
    asking = [f"{name} = {value!r}" for name, value in found.items() if value.lower() not in _OFF]
    if asking:
        line = f"{', '.join(asking)} has no effect: all that decides a run is in its settings."
        console.out(line, highlight=False)


def warn_of_bfloat16(trainer: Trainer, console: Console) -> None:
    """Warn of a run that computes in bfloat16 on a CPU that has no instructions for it, and how it would not.

    Args:
        trainer: of the run.
        console: where to print.
    """
    weights = list(cast(nn.Module, trainer.model).parameters())
    remedies = ["leave out --bf16"] * trainer.args.bf16
    remedies += ["use --dtype float32"] * any(weight.dtype == torch.bfloat16 for weight in weights)
    if remedies and not all(map(devices.multiplies_bfloat16, weights)):
        line = "This CPU has no instructions for bfloat16, which takes 8 to 80 times as long as float32 here:"
        console.out(f"{line} {' and '.join(remedies)}.", style="bold yellow", highlight=False)


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


def taken_bytes() -> int:
    """The memory that is taken now, as `peak_memory_bytes` counts it; on a GPU with what products of matrices keep.

    At a thread's first product torch allocates work space for cuBLAS that it never frees: 32 MiB on an H200. A training
    makes products in two threads, its own and that of the backward, so both make some here first: with a bias and
    without, for those are two libraries', whose work space may not be one.

    >>> taken_bytes() > 0
    True
    """
    if not torch.cuda.is_available():
        return int(psutil.Process().memory_info().rss)
    _multiply("cuda")
    return torch.cuda.memory_allocated()


def _multiply(device: str) -> None:
    rows = torch.ones(16, 16, device=device, requires_grad=True)  # none that are random: the run's numbers stay its own
    for bias in (None, torch.ones(16, device=device)):
        functional.linear(rows, rows, bias).sum().backward()  # type: ignore[no-untyped-call]


def versions(libraries: tuple[str, ...] = ()) -> dict[str, str]:
    """What runs are made with: versions of Python, torch, Transformers and more libraries, and the processors."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", *libraries, "galore-torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # noqa: PERF203
            found[name] = "not installed as a package"
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found["processor"] = names[0] if names else platform.processor() or platform.machine()
    return {**found, "GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else found


def planned_peak(job: Job, trainer: Trainer, console: Console) -> int | None:
    """Plan a run, print what it will need, and warn where that is more than is free.

    Args:
        job: what is trained.
        trainer: with the job's data in it.
        console: where to print.

    Returns:
        Bytes, as `peak_memory_bytes` will count them; None for a run of several
        processes, or one that cannot be planned.
    """
    columns = getattr(trainer.train_dataset, "column_names", None) or ()  # of a stream they may not be known
    if processes.count() > 1 or "input_ids" not in columns:  # pairs and prompts, which the trainer makes sequences of
        return None
    schedule, micro_batch = job.config.schedule, job.config.micro_batch
    rows = [trainer.train_dataset[row] for row in range(min(_ROWS, len(trainer.train_dataset)))]  # type: ignore[index, arg-type]
    rows = sorted(rows, key=lambda row: -len(row["input_ids"]))[:micro_batch]
    try:
        found = plan(
            optimizers.job(
                job.model,
                job.config.optimizer,
                schedule.seed,
                job.target_modules,
                batch=dict(trainer.data_collator(rows * (micro_batch // len(rows)))),
                micro_batches=schedule.batch // micro_batch,
                device=trainer.args.device.type,
            )
        )
    except Exception as error:  # of a model or a collator of any kind: a run does not fail for want of a plan
        console.out(f"The memory of this run cannot be planned: {error}", highlight=False)
        return None
    needed = found.peak_bytes - found.held["weights"]  # which are there already
    total = needed + taken_bytes()
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    parts = {"the process itself": max(0, total - found.peak_bytes), **found.peak}
    kinds = ", ".join(f"{readable(count)} {kind}" for kind, count in parts.items() if count)
    console.out(f"planned peak memory {readable(total)}: {kinds}", highlight=False)
    if needed > free:
        line = f"It needs {readable(needed)} more than there is now, and {readable(free)} are free."
        console.out(f"{line} galore plan says which methods need less.", style="bold yellow", highlight=False)
    return total
