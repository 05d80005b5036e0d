"""``metrics.jsonl`` and ``subspaces.jsonl``: what a run records. One JSON object a line.

Of ``metrics.jsonl`` there are three kinds:

| kind | fields |
| --- | --- |
| a step | step, tokens, loss (nats per token), lr, grad_norm, tokens_per_second, seconds |
| an evaluation | step, tokens, eval_loss (nats per token), perplexity, seconds |
| the end | final (true) and the figures of the whole run, see `galore_torch.training.run.job.RunResult` |

A fine-tuning counts examples in the place of tokens, has its task's scores in the place of perplexity and, where its
length is told in epochs, ``epoch``, how many have passed, in the records of steps. The end of a run on a stream has
``stream`` too: the SHA-256 of all tokens that it was trained on.

``seconds`` is time spent in training steps since the start, over all resumptions, without evaluations and saves.

``subspaces.jsonl`` has the renewals of an optimizer that projects, in the step that made them:

| field | |
| --- | --- |
| step | from 1 |
| weight | its name |
| renewals | how many bases it has had, this one included |
| gap | steps until it renews again; fewer after the first, to its turn among the staggered layers |
| overlap | how much of the subspace before is left: 1 all, 0 as in a random one; null of the first |
| captured | share of the energy of the gradient, at this renewal, that the basis before still held; null of the first |
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from galore_torch.training.run.files import write_whole

Record = dict[str, Any]

# What a record has besides, by the field that tells its kind.
_KINDS: dict[str, tuple[str, ...]] = {
    "final": ("step", "state_bytes", "peak_memory_bytes", "trained_parameters", "seconds"),
    "weight": ("step", "renewals", "gap", "overlap", "captured"),
    "eval_loss": ("step", "seconds"),
    "loss": ("step", "seconds", "lr"),
}
_TEXTS = frozenset({"weight", "optimizer", "adapter", "task", "stream"})


def read(path: Path) -> list[Record]:
    """All records of a run, in order; none if the file does not exist. A last line cut short by a crash is left out.

    Raises:
        ValueError: when the file is damaged, with the line and the remedy.
    """
    found: list[Record] = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else (), 1):
        if not line.endswith(b"\n"):
            continue
        record = _record(line)
        if record is None or (found and record["step"] < found[-1]["step"]):
            raise ValueError(
                f"{path} is damaged in line {number}, which is not a record of a run. Restore the file from a copy, or "
                "remove that line: to resume a run needs no records of the past."
            )
        found.append(record)
    return found


def _record(line: bytes) -> Record | None:
    """What a line holds; None if that is no record, whatever has become of it."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    kind = next((name for name in _KINDS if isinstance(record, dict) and name in record), None)
    if kind is None or any(isinstance(value, str) != (name in _TEXTS) for name, value in record.items() if value):
        return None
    step = record.get("step")
    whole = isinstance(step, int) and step >= 0 and all(name in record for name in _KINDS[kind])
    whole = whole and (kind in ("final", "weight") or "tokens" in record or "examples" in record)
    return record if whole and (kind == "weight" or isinstance(record["seconds"], (int, float))) else None


def final(path: Path) -> Record | None:
    """The record of the whole run, if it has ended."""
    return next((record for record in read(path) if record.get("final")), None)


def append(path: Path, record: Record) -> None:
    """Add one record."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line(record))


def line(record: Record) -> str:
    r"""A record as a line of JSON, with text as it is; of half a character, which UTF-8 has not, the escape stays.

    >>> line({"input": "café"})
    '{"input": "café"}\n'
    """
    return json.dumps(_finite(record), ensure_ascii=False).encode(errors="backslashreplace").decode() + "\n"


def _finite(value: Any) -> Any:
    """What JSON can hold: it knows no NaN and no infinity, so that a loss that is one of them is null."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_until(path: Path, step: int, *, final: bool = True) -> None:
    """Drop what was recorded after a step, which a resumed run makes again; the record of the end too, if asked for."""
    kept = (record for record in read(path) if record["step"] <= step and (final or "final" not in record))
    write_whole(path, "".join(map(line, kept)))


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats per token, infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
