"""Where `distributed/` says what it does for several processes, for the floors below, which do not know of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

JOIN: list[Callable[..., Any]] = []
"""`attach` asks it for a model's traffic (`gradients/data_parallel.py`), by its optimizer, the weights (by name) that
are projected before `step()`, the dtype of their images, and whether they are applied in the backward. None without a
process group."""
