"""What a run will need of memory: planned before its first step, and said beside what was measured after its last."""

from __future__ import annotations

import psutil
import torch
from rich.console import Console
from transformers import Trainer

from galore_torch.memory import Job as Planned
from galore_torch.memory import plan
from galore_torch.training.run import optimizers, processes
from galore_torch.training.run.job import Job
from galore_torch.units import readable

_ROWS = 1000  # among which the longest are looked for


def planned_peak(job: Job, trainer: Trainer, console: Console) -> int | None:
    """Plan a run, print what it will need, and warn where that is more than is free.

    Args:
        job: what is trained.
        trainer: with the job's data in it.
        console: where to print.

    Returns:
        Bytes, as `galore_torch.training.run.machine.peak_memory_bytes` will count them; None for a run of several
        processes, or one that cannot be planned.
    """
    columns = getattr(trainer.train_dataset, "column_names", None) or ()  # of a stream they may not be known
    if processes.count() > 1 or "input_ids" not in columns:  # pairs and prompts, which the trainer makes sequences of
        return None
    settings, schedule, micro_batch = job.config.optimizer, job.config.schedule, job.config.micro_batch
    rows = [trainer.train_dataset[row] for row in range(min(_ROWS, len(trainer.train_dataset)))]  # type: ignore[index, arg-type]
    rows = sorted(rows, key=lambda row: -len(row["input_ids"]))[:micro_batch]
    try:
        found = plan(
            Planned(
                model=job.model,
                optimizer=lambda model: optimizers.build(model, settings, schedule.seed, job.target_modules),
                batch=dict(trainer.data_collator(rows * (micro_batch // len(rows)))),
                gradients=settings.gradients,
                update=settings.update,
                grad_bits=settings.grad_bits,
                micro_batches=schedule.batch // micro_batch,
                device=trainer.args.device.type,
            )
        )
    except Exception as error:  # of a model or a collator of any kind: a run does not fail for want of a plan
        console.out(f"The memory of this run cannot be planned: {error}", highlight=False)
        return None
    on_gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    needed = found.peak_bytes - found.held["weights"]  # which are there already
    kinds = ", ".join(f"{readable(count)} {kind}" for kind, count in found.peak.items() if count)
    console.out(f"planned peak memory {readable(found.peak_bytes)}: {kinds}", highlight=False)
    if needed > free:
        line = f"It needs {readable(needed)} more than there is now, and {readable(free)} are free."
        console.out(f"{line} galore plan says which methods need less.", style="bold yellow", highlight=False)
    return needed + (torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss)
