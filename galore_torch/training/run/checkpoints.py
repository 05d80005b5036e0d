"""A run's resumable states: each is written whole or not at all, and told apart from one that was damaged later.

checkpoints/
  checkpoint-N/     the state after step N, as Transformers' Trainer writes it, and manifest.json: size and SHA-256 of
                    each of its files. Of a run on a stream it has stream.sha256 too: the digest of all tokens that were
                    trained on until then. The last `KEPT` are kept, and that of the best evaluation, if the run is
                    to end with it.
  tmp/              what is being written or removed

The Trainer writes into ``tmp``. When all is there the manifest is written, everything is synced to the disk, and one
rename makes it a checkpoint. So whatever lacks a file, or has another than its manifest says, was damaged, not torn.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from galore_torch.training.run.files import damage, sync, write_manifest

KEPT = 2
"""Checkpoints that a run keeps: the newest, and the one before it in case that the newest gets damaged."""

_STREAM = "stream.sha256"


class Checkpoints:
    """The checkpoints of one run, below ``root``; the Trainer writes into ``tmp``."""

    def __init__(self, root: Path) -> None:
        self.root, self.tmp = root, root / "tmp"

    def newest_first(self) -> list[Path]:
        """All of them, not looked into."""
        found = [path for path in self.root.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted(found, key=step_of, reverse=True)

    def newest(self) -> Path | None:
        """The newest one, not looked into."""
        return next(iter(self.newest_first()), None)

    def newest_whole(self, warn: Callable[[str], None]) -> Path | None:
        """The newest one whose files are all as they were written; None if there are no checkpoints.

        Args:
            warn: called for each newer one with what is wrong with it, in a sentence.

        Raises:
            ValueError: when there are some, and all are damaged.
        """
        damaged: list[str] = []
        for checkpoint in self.newest_first():
            wrong = damage(checkpoint)
            if wrong is None:
                for each in damaged:
                    warn(f"{each}. Resuming from {checkpoint.name}.")
                return checkpoint
            damaged.append(f"{checkpoint.name} is damaged: {wrong}")
        if damaged:
            raise ValueError(
                f"out = {str(self.root.parent)!r}: {'; '.join(damaged)}; and there is no other. Restore the files from "
                "a copy, or start over with another --out."
            )
        return None

    def best(self, checkpoint: Path | None) -> Path | None:
        """The one of the best evaluation until a checkpoint, if that tells: its weights may be wanted at the end."""
        step = trainer_state(checkpoint).get("best_global_step")
        return self.of(step) if step else None

    def of(self, step: int) -> Path:
        """Where the state after a step is, or was."""
        return self.root / f"checkpoint-{step}"

    def complete(self, step: int, before: Path | None, stream: str | None = None) -> Path:
        """Make a checkpoint of what the Trainer has written after a step, and remove older ones than the one before.

        Of both, that of the best evaluation until then stays.

        The digest of what of a ``stream`` was trained on until then is kept in it.
        """
        target = self.of(step)
        written = self.tmp / target.name
        if stream is not None:
            (written / _STREAM).write_text(stream, encoding="utf-8")
        for path in written.rglob("*"):
            sync(path)
        write_manifest(written)
        sync(written)
        if target.exists():  # damaged, or the run has gone back behind it
            self._remove(target)
        os.replace(written, target)  # noqa: PTH105
        sync(self.root)
        kept = (before, self.best(before), self.best(target))
        for other in self.newest_first():
            if step_of(other) < step and other not in kept:
                self._remove(other)
        return target

    def clear(self) -> None:
        """Remove what a killed process was writing or removing."""
        shutil.rmtree(self.tmp, ignore_errors=True)

    def _remove(self, checkpoint: Path) -> None:
        """Remove one, so that it is never seen without some of its files."""
        aside = self.tmp / f"{checkpoint.name}.removed"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)  # noqa: PTH105
        shutil.rmtree(aside)


def trainer_state(checkpoint: Path | None) -> dict[str, Any]:
    """What the Trainer keeps of a checkpoint beside model and optimizer; nothing if there is none."""
    path = None if checkpoint is None else checkpoint / "trainer_state.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path is not None and path.exists() else {}


def stream_digest(checkpoint: Path | None) -> str | None:
    """What a checkpoint tells of a stream; None if there is none, or its run is on none."""
    path = None if checkpoint is None else checkpoint / _STREAM
    return path.read_text(encoding="utf-8") if path is not None and path.exists() else None


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])
