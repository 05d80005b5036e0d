"""What a run asks of the machine that it is on: one process, one GPU of many, and trackers that are installed."""

from __future__ import annotations

import os

from rich.console import Console
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations


def require_one_process(job: str) -> None:
    """Refuse a launcher of many processes.

    Args:
        job: what runs in one, for the message.

    Raises:
        ValueError: when this process is one of several.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ValueError(f"WORLD_SIZE = {processes}: {job} runs in one process; start it without a launcher.")


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
            f"Without effect here, for a run's settings decide: {', '.join(asking)}",
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


def on_one_gpu(arguments: TrainingArguments) -> TrainingArguments:
    """Keep the Trainer to one GPU: DataParallel would multiply the batch."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
