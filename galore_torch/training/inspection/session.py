"""An inspection from subject to figures: a Trainer with an observer in it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from transformers import Trainer

from galore_torch.training.inspection.config import InspectConfig
from galore_torch.training.inspection.observing import Observer, require_steps
from galore_torch.training.inspection.result import Inspection, concluded
from galore_torch.training.inspection.subject import Subject
from galore_torch.training.run.progress import StepProgress
from galore_torch.training.run.units import megabytes


@dataclass(frozen=True, kw_only=True)
class Session:
    """Steps that are ready to be made: all that was asked for has been judged.

    Attributes:
        subject: what is looked at.
        config: by which settings.
        trainer: makes the steps.
        observer: looks.
        progress: shows them.
        rank: at which figures are told.
    """

    subject: Subject
    config: InspectConfig
    trainer: Trainer
    observer: Observer
    progress: StepProgress
    rank: int

    @property
    def announcement(self) -> str:
        """What is about to be done, and the memory that it takes besides the training's."""
        looks = self.config.looks
        return (
            f"[bold]{escape(self.subject.title)}[/]: {len(self.observer.watches)} weights, {looks.looks} looks, one "
            f"every {looks.every} steps; their bases take {megabytes(self.observer.kept_bytes)}"
        )

    def make_steps(self) -> None:
        """Train and look. Only once."""
        try:
            self.trainer.train()
        finally:
            self.progress.stop()

    def conclude(self) -> Inspection:
        """The figures.

        Raises:
            ValueError: when no gradient could be looked at.
        """
        losses = [log["loss"] for log in self.trainer.state.log_history if "loss" in log]
        return concluded(self.subject, self.config, self.observer.watches, losses, self.rank)


@contextmanager
def session(subject: Subject, config: InspectConfig, console: Console) -> Iterator[Session]:
    """Prepare the steps. What the Trainer needs a folder for is gone afterwards.

    Args:
        subject: what is looked at.
        config: by which settings.
        console: where progress is shown.

    Raises:
        ValueError: when no weight is meant, or the training would end before the last look.
    """
    looks = config.looks
    rank = looks.rank or subject.rank
    observer = Observer(subject.weights(looks.target_modules), looks, rank)
    progress = StepProgress(console, steps=looks.looks * looks.every)
    with tempfile.TemporaryDirectory(prefix="galore-inspect-") as scratch:
        trainer = subject.trainer(scratch, [observer, progress])
        require_steps(trainer, looks)
        yield Session(subject=subject, config=config, trainer=trainer, observer=observer, progress=progress, rank=rank)
