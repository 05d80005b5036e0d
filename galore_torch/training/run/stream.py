"""Rows that arrive one after the other: a running digest says, after every step, which tokens it was trained on.

A stream cannot be digested before it is read. So every checkpoint of a run on one holds the digest of all that was
trained on until then, and a resumed run, which has to read it all again to get there, compares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from galore_torch.training.run.checkpoints import step_of, stream_digest
from galore_torch.training.run.folder import OtherDataError


class Stream(IterableDataset[dict[str, Any]]):
    """Rows ``input_ids``, all of one length, in the order in which they are trained on.

    Args:
        rows: read anew by every iteration.
        batch: rows of a step.
        data: the name of what they are of.
        endless: whether they are read again and again, in the same order.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], *, batch: int, data: str, endless: bool = False) -> None:
        self._rows, self._batch, self._data, self._endless = rows, batch, data, endless
        self._length: int | None = None  # how many they are, known once they have been read to their end
        self._digests: dict[int, str | None] = {}  # after the last steps: a Trainer reads less than a step ahead
        self._checkpoint: Path | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Give the rows from the first one on.

        Raises:
            OtherDataError: before any row is trained on, where those until the checkpoint are not what they were.
        """
        tokens, count = hashlib.sha256(), 0
        for count, row in enumerate(self._passes(), 1):
            tokens.update(np.asarray(row["input_ids"], dtype="<i8").tobytes())
            step, left = divmod(count, self._batch)
            if not left:
                self._digests = {step - 1: self.digest(step - 1), step: tokens.hexdigest()}
                if self._checkpoint is not None and step == step_of(self._checkpoint):
                    self._require_same(self._checkpoint, tokens.hexdigest())
            yield row
        if self._checkpoint is not None and count < step_of(self._checkpoint) * self._batch:
            self._require_same(self._checkpoint, tokens.hexdigest())

    def _passes(self) -> Iterator[dict[str, Any]]:
        """The rows once, or again and again unless there are none."""
        self._length = None
        while self._length is None or (self._endless and self._length):
            count = 0
            for row in self._rows:
                count += 1
                yield row
            self._length = count

    def digest(self, step: int) -> str | None:
        """The digest of what was trained on until a step, one of the last two that were read."""
        return self._digests.get(step)

    def go_on_from(self, checkpoint: Path) -> None:
        """Demand that what is read is what the run of a checkpoint was trained on."""
        self._checkpoint = checkpoint

    def _require_same(self, checkpoint: Path, found: str) -> None:
        known, step = stream_digest(checkpoint), step_of(checkpoint)
        if found != known:
            trained = f"{step * self._batch:,} sequences until step {step}"
            fewer = "" if self._length is None else f"it has {self._length:,} sequences, of {trained}; "
            raise OtherDataError(
                f"data = {self._data!r} has changed since the run in {str(checkpoint.parents[1])!r} was trained on it: "
                f"{fewer}the SHA-256 of {trained} was {known} and is {found}; restore the data, or start over with "
                "another --out."
            )
