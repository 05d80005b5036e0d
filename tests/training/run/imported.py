"""What a child process imports, told to the process that called it; a module of its own, for the child imports it."""

import importlib
import sys
from collections.abc import Sequence
from typing import Any


def import_all(names: Sequence[str], console: Any) -> list[str]:
    """Where modules were found, and where else they are looked for."""
    return [str(importlib.import_module(name).__file__) for name in names] + sys.path
