"""A run folder: where one training keeps its configuration, its metrics, its checkpoints and what it made.

runs/NAME/
  config.toml     every setting, as resolved
  text.sha256     digests of the text and of config.toml: a resumed run must find the same
  metrics.jsonl   one record a step and an evaluation, and a last one of the whole run
  subspaces.jsonl one record a renewal of a weight's basis, if the optimizer projects
  checkpoints/    the last resumable states, see `galore_torch.training.run.checkpoints`
  model/          weights, configuration and tokenizer, for Transformers' Auto classes
  loss.png        the losses
  predictions.jsonl  what a fine-tuned model says of the held-out rows
  run.lock        locked by the process that works on the run; run.holder says which that is

Only what a process has made itself is removed by it, and a run with a checkpoint never.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from galore_torch.training.run import records
from galore_torch.training.run.checkpoints import Checkpoints
from galore_torch.training.run.files import being_written, take_back, write_whole
from galore_torch.training.run.locks import Lock
from galore_torch.training.run.signals import held_back

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
class _Hold:
    """A run folder that this process works in, or has worked in.

    Attributes:
        lock: keeps others out; released when the work has ended.
        began: whether the run was begun by this process.
        made: whether the folder was.
    """

    lock: Lock
    began: bool
    made: bool


_holds: dict[Path, _Hold] = {}


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
        """The records; see `galore_torch.training.run.records`."""
        return self.root / "metrics.jsonl"

    @property
    def subspaces(self) -> Path:
        """The records of renewals; see `galore_torch.training.run.records`."""
        return self.root / "subspaces.jsonl"

    @property
    def checkpoints(self) -> Checkpoints:
        """The resumable states."""
        return Checkpoints(self.root / "checkpoints")

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

    @property
    def _lock(self) -> Lock:
        return Lock(self.root / "run.lock")

    @property
    def _hold(self) -> _Hold | None:
        return _holds.get(self.root.resolve())

    def hold(self, *, began: bool = False, made: bool = False) -> None:
        """Take the folder for this process alone, until `release` or the end of the process.

        Args:
            began: whether this process begins the run, and may take it back.
            made: whether it has made the folder.

        Raises:
            ValueError: when another process, or another run of this one, works in it.
        """
        lock, hold = self._lock, self._hold
        if (hold is not None and hold.lock.is_held) or not lock.acquire():
            raise ValueError(
                f"out = {str(self.root)!r} is in use by {lock.holder()}; wait for its end, or choose another --out."
            )
        _holds[self.root.resolve()] = _Hold(lock, began, made)

    def release(self) -> None:
        """Let others work in it."""
        hold = self._hold
        if hold is not None:
            hold.lock.release()

    def wait_until_free(self, waiting: Callable[[str], None]) -> None:
        """Wait for whoever works in it.

        Args:
            waiting: called with the holder before a wait.
        """
        if self.root.is_dir():
            lock = self._lock
            lock.acquire(waiting=waiting)
            lock.release()

    @property
    def was_begun_here(self) -> bool:
        """Whether this process has begun the run."""
        return self._hold is not None and self._hold.began

    def require_new(self) -> None:
        """Refuse a folder that already holds something, other than a start that was killed leaves.

        Raises:
            ValueError: when the folder is not empty or is no folder.
        """
        if self.config.exists():
            raise ValueError(
                f"out = {str(self.root)!r} already holds a run; go on with it by --resume --out {self.root}, "
                "or choose another --out."
            )
        started = {*self._lock.files, self.text, self.config}
        started |= {being_written(file) for file in started}
        if self.root.exists() and not (self.root.is_dir() and started.issuperset(self.root.iterdir())):
            raise ValueError(f"out = {str(self.root)!r} exists and is no empty folder; choose another --out.")

    def create(self, config: Configuration, text_digest: str) -> None:
        """Make the folder, hold it, and write into it what the run is.

        Raises:
            ValueError: when the folder holds something by now, or another process works in it.
        """
        self.require_new()
        settings = config.to_toml()
        digests = {_TEXT: text_digest, self.config.name: _digest(settings)}
        with held_back():
            made = not self.root.exists()
            self.root.mkdir(parents=True, exist_ok=True)
            self.hold(began=True, made=made)
            try:
                self.require_new()  # for good: no other process of ours writes into it any more
                write_whole(self.text, "".join(f"{digest}  {name}\n" for name, digest in digests.items()))
                write_whole(self.config, settings)  # last: a folder that has it is a run's
            except BaseException:
                self.abandon()
                raise

    def abandon(self) -> None:
        """Take back what this process has made of a run that it began, unless there is a checkpoint; let others work.

        What others have put into the folder stays.
        """
        hold = self._hold
        if hold is None or not hold.lock.is_held:
            return
        unsaved = hold.began and self.checkpoints.newest() is None
        if unsaved:
            self.checkpoints.clear()
            take_back([self.config, self.text, self.metrics, self.subspaces], [self.checkpoints.root])
        hold.lock.release(remove=unsaved)
        if unsaved and hold.made:
            take_back([], [self.root])

    @contextmanager
    def being_prepared(self) -> Iterator[None]:
        """Around what may still fail before a run is ready: if it does, the folder is as it was, and free."""
        try:
            yield
        except BaseException:
            self.abandon()
            raise

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
