"""What happens to a run in the course of one of its steps: Ctrl-C, a crash; and how far it is."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from galore_torch.training.run import records


class During(TrainerCallback):
    """Does something at the beginning of one step."""

    def __init__(self, step: int, act: Callable[[], Any]) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            self.act()


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def crash() -> None:
    raise RuntimeError("the machine went down")


def last_record(metrics: Path) -> dict[str, Any] | None:
    """The newest whole record of a run, which may be writing another one."""
    return next(reversed(records.read(metrics)), None)
