"""A run folder: where one training keeps its configuration, its metrics, its checkpoints and what it made.

runs/NAME/
  config.toml     every setting, as resolved
  text.sha256     digests of the text and of config.toml: a resumed run must find the same. Text that is streamed
                  is digested as it is read, see `galore_torch.training.run.stream`
  changes.jsonl   settings that a resumption has changed, a line each: from which step, and by name old and new value
  metrics.jsonl   one record a step and an evaluation, and a last one of the whole run
  subspaces.jsonl one record a renewal of a weight's basis, if the optimizer projects
  checkpoints/    the last resumable states, see `galore_torch.training.run.checkpoints`
  model/          weights, configuration and tokenizer, for Transformers' Auto classes
  loss.png        the losses
  events/         what TensorBoard shows, if it was reported to
  predictions.jsonl  what a fine-tuned model says of the held-out rows
  launch          which launch of torchrun began it, if one did: what that starts anew goes on
  run.lock        locked by the process that works on the run; run.holder says which that is

Only what a process has made itself is removed by it, and a run with a checkpoint never. All that a folder is refused
for is a ValueError with the remedy.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

from galore_torch.training.run import records
from galore_torch.training.run.checkpoints import Checkpoints, step_of
from galore_torch.training.run.files import Lock, require_empty, require_whole, require_writable, take_back, write_whole
from galore_torch.training.run.signals import deferred
from galore_torch.training.settings.config import read_file, read_toml

LAUNCH = "TORCHELASTIC_RUN_ID"
"""Where torchrun names its launch to the processes that it starts, all of them and anew; "none" if it was not given."""

LONGER = ("steps", "epochs", "early_stopping_patience")
"""Settings that make a run longer, also one that has ended."""

CHANGEABLE = (
    *LONGER, "eval_every", "save_every", "micro_batch", "gradient_checkpointing", "report_to", "push_to_hub"
)  # fmt: skip
"""Settings that may be given with ``--resume``: how long, what is recorded, what bounds memory, where a model goes."""


class OtherDataError(ValueError):
    """What a resumed run is to be trained on is not what it was trained on until now."""


class RunFolder:
    """The paths of a run, below ``root``, as the module describes them.

    Attributes:
        was_begun_here: whether the run was begun by this object.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.toml"
        self.text = root / "text.sha256"
        self.launch = root / "launch"
        self.changes = root / "changes.jsonl"
        self.metrics = root / "metrics.jsonl"
        self.subspaces = root / "subspaces.jsonl"
        self.checkpoints = Checkpoints(root / "checkpoints")
        self.model = root / "model"
        self.predictions = root / "predictions.jsonl"
        self.plot = root / "loss.png"
        self.events = root / "events"
        self._lock = Lock(root / "run.lock")
        self.was_begun_here = self._made = False

    @property
    def final(self) -> records.Record | None:
        """The record of the whole run, if it has ended."""
        return records.final(self.metrics)

    def result(self) -> dict[str, Any]:
        """What the finished run came to, as it said at its end; see `galore_torch.training.run.job.RunResult`."""
        known = {"out": str(self.root), "finished": True, "checkpoint": None, **(self.final or {})}
        return {name: value for name, value in known.items() if name not in ("final", "stream")}

    def hold(self, *, began: bool = False, made: bool = False) -> None:
        """Take the folder for this object alone, or refuse one in which another process or run is at work.

        It is held until `release` or the end of the process; `abandon` takes back what it ``began`` and ``made``.
        """
        if self._lock.is_held or not self._lock.acquire():
            holder = self._lock.holder()
            raise self._refused(f"is in use by {holder}; wait for its end, or choose another --out.")
        self.was_begun_here, self._made = began, made

    def release(self) -> None:
        """Let others work in it."""
        self._lock.release()

    def wait_until_free(self, waiting: Callable[[str], None]) -> None:
        """Wait for whoever works in it; ``waiting`` is called with the holder before a wait."""
        if self.root.is_dir():
            self._lock.acquire(waiting=waiting)
            self._lock.release()

    def require_new(self) -> None:
        """Refuse a folder that already holds something, other than a start that was killed leaves."""
        if self.config.exists():
            raise self._refused(
                f"already holds a run; resume it with --resume --out {quote(str(self.root))}, or choose another --out."
            )
        require_empty(self.root, (*self._lock.files, self.launch, self.text, self.config))
        require_writable("out", self.root)

    def create(self, config: Any, digest: str) -> None:
        """Make the folder, hold it, and write into it what the run is: its settings and the digest of its text."""
        self.require_new()
        settings: str = config.to_toml()
        digests = {"text": digest, self.config.name: _digest(settings)}
        with deferred(until_after=True):
            made = not self.root.exists()
            self.root.mkdir(parents=True, exist_ok=True)
            self.hold(began=True, made=made)
            try:
                self.require_new()  # for good: no other process of ours writes into it any more
                if LAUNCH in os.environ:
                    write_whole(self.launch, os.environ[LAUNCH])
                write_whole(self.text, "".join(f"{digest}  {name}\n" for name, digest in digests.items()))
                write_whole(self.config, settings)  # last: a folder that has it is a run's
            except BaseException:
                self.abandon()
                raise

    def abandon(self) -> None:
        """Take back what this object has made of a run that it began, unless there is a checkpoint; let others work.

        What others have put into the folder stays.
        """
        if not self._lock.is_held:
            return
        unsaved = self.was_begun_here and self.checkpoints.newest() is None
        if unsaved:
            self.checkpoints.clear()
            take_back(
                [self.config, self.launch, self.text, self.changes, self.metrics, self.subspaces],
                [self.checkpoints.root],
            )
        self._lock.release(remove=unsaved)
        if unsaved and self._made:
            take_back([], [self.root])

    @contextmanager
    def being_prepared(self) -> Iterator[None]:
        """Around what may still fail before a run is ready: if it does, the folder is as it was, and free."""
        try:
            yield
        except BaseException:
            self.abandon()
            raise

    def require_unfinished(self, others: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Refuse a folder in which nothing is left to do, and settings that no resumption may change, by their names.

        Those that it may, which have a value, are returned: a finished run goes on by more steps or epochs.
        """
        changes = {name: value for name, value in (others or {}).items() if value is not None}
        fixed = [name for name in changes if name not in CHANGEABLE]
        if fixed:
            raise ValueError(
                f"--resume uses the settings of the run; leave out {', '.join(fixed)}. What may change is "
                f"{', '.join(CHANGEABLE)}; with other settings a new run can start from its model: "
                f"--model {quote(str(self.root))}."
            )
        if not self.config.exists():
            raise self._refused("holds no run to resume; leave out --resume to start one there.")
        final = self.final
        newest = self.checkpoints.newest()
        done = final["step"] if final else 0 if newest is None else step_of(newest)
        if final is not None and not changes.keys() & set(LONGER):
            raise self._refused(
                f"holds a run that ended after step {done}; choose another --out to train from scratch, or make it "
                "longer by --steps."
            )
        if final is not None and newest is None:
            raise self._refused(
                f"holds a run that ended after step {done}, and its checkpoints are gone: it cannot be longer. "
                f"A new run can start from its model: --model {quote(str(self.root))}."
            )
        if changes.get("steps", done + 1) <= done:
            raise ValueError(f"steps = {changes['steps']}, and the run has made {done}; give more.")
        records.read(self.subspaces)  # which is read again once the training begins
        return changes

    def record_changes(self, step: int, changed: Mapping[str, Any]) -> None:
        """Write down settings' old and new values from a step on; a run that had ended has not ended any more."""
        if self.final is not None:
            records.keep_until(self.metrics, step, final=False)
        records.append(self.changes, {"step": step, **changed})

    def settings(self, config: type | None = None) -> dict[str, Any]:
        """The settings by name, with what resumptions have changed.

        A ``config.toml`` that is not as it was written is refused: what it lacks would be as it is by default. So is
        what has no place in ``config``, the configuration of its job, if that is known.
        """
        if _digest(_read(self.config)) != self.digest_of(self.config.name):
            raise ValueError(
                f"{self.config} is not as it was when the run was started: it is damaged, or was edited. Restore it, "
                "or start over with another --out."
            )
        if config is None:
            sections = [section for section in read_toml(self.config).values() if isinstance(section, dict)]
            began = {name: value for section in sections for name, value in section.items()}
        else:
            _, began = read_file(config, self.config)
        lines = _read(self.changes).splitlines(keepends=True)
        try:
            found = [json.loads(line) for line in lines if line.endswith("\n")]
            return began | {name: value[1] for one in found for name, value in one.items() if name != "step"}
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{self.changes} is damaged. Restore it from a copy.") from error

    def newest_weights(self) -> tuple[Path, int]:
        """The folder of the finished model or of the newest whole checkpoint, and how many steps have made it.

        Raises:
            ValueError: when there is neither, or the model is damaged.
        """
        final, checkpoint = self.final, self.checkpoints.newest_whole(warnings.warn)
        if final is not None and self.model.is_dir():
            require_whole("run", str(self.root), self.model)
            return self.model, final["step"]
        if checkpoint is None:
            run = str(self.root)
            raise ValueError(f"run = {run!r} holds neither a finished model nor a checkpoint; give --fresh with it.")
        return checkpoint, step_of(checkpoint)

    def require_text(self, digest: str, data: str) -> None:
        """Refuse to resume with another text than the run was started on, by their digests."""
        if self.digest_of() != digest:
            raise OtherDataError(
                f"data = {data!r} has changed since the run in {str(self.root)!r} was started; "
                "restore the text, or start over with another --out."
            )

    def digest_of(self, name: str = "text") -> str:
        """The digest of what the run is trained on, or of its settings."""
        lines = (line.partition("  ") for line in _read(self.text).splitlines())
        found = {name: digest for digest, _, name in lines}
        whole = all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in found.values())
        if not whole or found.keys() != {"text", self.config.name}:
            raise ValueError(
                f"{self.text} is missing or damaged, so that settings and data cannot be compared with those that the "
                "run was started with. Restore it from a copy, or start over with another --out."
            )
        return found[name]

    def _refused(self, why: str) -> ValueError:
        return ValueError(f"out = {str(self.root)!r} {why}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> str:
    """What is in a file; nothing if it is missing or no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
