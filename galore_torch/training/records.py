"""``metrics.jsonl``: what a run records. One JSON object a line, of three kinds.

| kind | fields |
| --- | --- |
| a step | step, tokens, loss (nats per token), lr, grad_norm, tokens_per_second, seconds |
| an evaluation | step, tokens, eval_loss (nats per token), perplexity, seconds |
| the end | final (true) and the figures of the whole run, see `galore_torch.training.pretrain.RunResult` |

``seconds`` is time spent in training steps since the start, over all resumptions, without evaluations and saves.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """All records of a run, in order; none if the file does not exist. A last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def final(path: Path) -> Record | None:
    """The record of the whole run, if it has ended."""
    return next((record for record in read(path) if record.get("final")), None)


def append(path: Path, record: Record) -> None:
    """Add one record."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(record))


def _line(record: Record) -> str:
    # JSON knows no NaN and no infinity: a loss that is neither finite nor a number is null.
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    return json.dumps(finite) + "\n"


def keep_until(path: Path, step: int) -> None:
    """Drop what was recorded after a step: a resumed run makes those steps again."""
    kept = [record for record in read(path) if record["step"] <= step]
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(map(_line, kept)), encoding="utf-8")
    os.replace(unfinished, path)  # noqa: PTH105


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats per token, infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
