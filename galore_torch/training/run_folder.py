"""A run folder: where one training keeps its configuration, its metrics, its checkpoints and what it made.

runs/NAME/
  config.toml     every setting, as resolved
  text.sha256     digests of the text and of config.toml: a resumed run must find the same
  metrics.jsonl   one record a step and an evaluation, and a last one of the whole run
  subspaces.jsonl one record a renewal of a weight's basis, if the optimizer projects
  checkpoints/    the newest resumable state, as Transformers' Trainer writes it
  model/          weights, configuration and tokenizer, for Transformers' Auto classes
  loss.png        the losses
  predictions.jsonl  what a fine-tuned model says of the held-out rows
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from galore_torch.training import records
from galore_torch.training.config import PretrainConfig, from_values, read_values
from galore_torch.training.files import write_whole

_TEXT = "text"
_HEX = re.compile(r"[0-9a-f]{64}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Configuration(Protocol):
    """The settings of any kind of run."""

    def to_toml(self) -> str:
        """All of them, as resolved."""
        ...


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run, below ``root``."""

    root: Path

    @property
    def config(self) -> Path:
        """Every setting, as resolved."""
        return self.root / "config.toml"

    @property
    def text(self) -> Path:
        """The digest of the text."""
        return self.root / "text.sha256"

    @property
    def metrics(self) -> Path:
        """The records; see `galore_torch.training.records`."""
        return self.root / "metrics.jsonl"

    @property
    def subspaces(self) -> Path:
        """The records of renewals; see `galore_torch.training.subspaces`."""
        return self.root / "subspaces.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The Trainer's output folder."""
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """The finished model and its tokenizer."""
        return self.root / "model"

    @property
    def predictions(self) -> Path:
        """What a fine-tuned model says of the held-out rows."""
        return self.root / "predictions.jsonl"

    @property
    def plot(self) -> Path:
        """The losses drawn."""
        return self.root / "loss.png"

    def require_new(self) -> None:
        """Refuse a folder that already holds something.

        Raises:
            ValueError: when the folder is not empty or is no folder.
        """
        if self.config.exists():
            raise ValueError(
                f"out = {str(self.root)!r} already holds a run; go on with it by --resume --out {self.root}, "
                "or choose another --out."
            )
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise ValueError(f"out = {str(self.root)!r} exists and is no empty folder; choose another --out.")

    def create(self, config: Configuration, text_digest: str) -> None:
        """Make the folder and write into it what the run is."""
        self.root.mkdir(parents=True, exist_ok=True)
        settings = config.to_toml()
        digests = {_TEXT: text_digest, self.config.name: _digest(settings)}
        write_whole(self.text, "".join(f"{digest}  {name}\n" for name, digest in digests.items()))
        write_whole(self.config, settings)  # last: a folder that has it is a run's

    def require_unfinished(self) -> None:
        """Refuse a folder in which nothing is left to do.

        Raises:
            ValueError: when there is no run, or it has ended.
        """
        if not self.config.exists():
            raise ValueError(f"out = {str(self.root)!r} holds no run to resume; leave out --resume to start one there.")
        final = records.final(self.metrics)
        if final is not None:
            raise ValueError(
                f"out = {str(self.root)!r} holds a run that ended after step {final['step']}; "
                "choose another --out to train anew."
            )
        records.read(self.subspaces)  # which is read again once the training begins

    @staticmethod
    def to_resume(out: Path | None, others: Mapping[str, Any]) -> Path:
        """The folder of a run that can be gone on with.

        Args:
            out: as given.
            others: settings by name, which must all be None: the run has its own.

        Raises:
            ValueError: when there is no such run, or it has ended, or settings are given.
        """
        if out is None:
            raise ValueError("resume needs to know which run; give its folder as --out runs/NAME.")
        also = [name for name, value in others.items() if value is not None]
        if also:
            raise ValueError(f"resume goes on by the run's own settings; leave out {', '.join(also)}.")
        RunFolder(out).require_unfinished()
        return out

    def read_config(self) -> PretrainConfig:
        """The configuration that the run was started with.

        Raises:
            ValueError: when it is not as it was written.
        """
        self.require_settings()
        return from_values(read_values(self.config)[1])

    def require_settings(self) -> None:
        """Refuse a ``config.toml`` that is not as it was written: what it lacks would be as it is by default.

        Raises:
            ValueError: when it has been damaged or edited.
        """
        try:
            settings = self.config.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            settings = ""
        if _digest(settings) != self._digests()[self.config.name]:
            raise ValueError(
                f"{self.config} is not as it was when the run was started: it is damaged, or was edited. Restore it, "
                "or start anew with another --out."
            )

    def text_digest(self) -> str:
        """The digest of what the run is trained on.

        Raises:
            ValueError: when it is missing or damaged.
        """
        return self._digests()[_TEXT]

    def _digests(self) -> dict[str, str]:
        try:
            lines = self.text.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            lines = []
        found = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        if found.keys() != {_TEXT, self.config.name} or not all(map(_HEX.fullmatch, found.values())):
            raise ValueError(
                f"{self.text} is missing or damaged, so that nobody can tell whether settings and data are those that "
                "the run was started with. Restore it from a copy, or start anew with another --out."
            )
        return found

    def require_text(self, digest: str, data: str) -> None:
        """Refuse to go on with another text than the run was started on.

        Raises:
            ValueError: when the digests differ.
        """
        if self.text_digest() != digest:
            raise ValueError(
                f"data = {data!r} has changed since the run in {str(self.root)!r} was started; "
                "restore the text, or start anew with another --out."
            )

    def last_checkpoint(self) -> Path | None:
        """The newest resumable state, if there is one."""
        return max((path for path in self._checkpoints() if _is_whole(path)), key=self.step_of, default=None)

    def drop_torn_checkpoints(self) -> None:
        """Remove half-written checkpoints of a killed process, which the Trainer would take for whole ones."""
        for path in self._checkpoints():
            if not _is_whole(path):
                shutil.rmtree(path)

    def step_of(self, checkpoint: Path) -> int:
        """The step after which a checkpoint was written."""
        return int(checkpoint.name.rpartition("-")[2])

    def _checkpoints(self) -> list[Path]:
        return [path for path in self.checkpoints.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer writes its own state last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
