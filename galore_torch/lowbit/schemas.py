"""What an operation that torch hands to a subclass of Tensor writes to: its schema says it, but for collectives."""

from __future__ import annotations

from typing import Any

COLLECTIVES = ("c10d", "_c10d_functional", "c10d_functional")
"""Namespaces of operations between processes. Their schemas do not say what they write to."""


def written_to(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes to."""
    specs = func._schema.arguments
    given = [*zip(args, specs, strict=False), *((kwargs.get(spec.name), spec) for spec in specs[len(args) :])]
    return [value for value, spec in given if spec.alias_info and spec.alias_info.is_write]
