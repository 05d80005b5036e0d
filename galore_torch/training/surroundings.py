"""What a run asks of the machine that it is on: one process, one GPU of many, and trackers that are installed."""

from __future__ import annotations

import os

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
