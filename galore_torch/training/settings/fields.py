"""Settings: declared once as dataclass fields, checked when made, read from TOML, shown in ``--help``.

A configuration is a frozen, keyword-only dataclass whose fields are made by `setting`. The field carries its default,
its help and its limits; `check` enforces them, so a value is judged by the same words wherever it came from.
"""

import dataclasses
import math
import operator
import sys
import types
import typing
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import tomli_w

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    choices: Iterable[str | int] = (),
    shown: str | None = None,
) -> Any:
    """Declare one setting as a dataclass field.

    Args:
        default: its value when nobody says otherwise; None where something else decides (the help says what).
        help: one or two sentences for ``--help``, with the unit.
        minimum: the least value allowed.
        above: a bound that the value must exceed.
        maximum: the greatest value allowed.
        below: a bound that the value must stay under.
        choices: the only values allowed, if not every one is.
        shown: what ``--help`` says of the default, where that is not the default itself.

    Returns:
        A `dataclasses.field`.
    """
    limits = {"minimum": minimum, "above": above, "maximum": maximum, "below": below, "choices": tuple(choices)}
    return dataclasses.field(default=default, metadata={"help": help, "shown": shown, **limits})


def check(config: Any) -> None:
    """Hold every field of a configuration to its type and its limits.

    Whole numbers are accepted where a float is asked for and are stored as floats. No float is infinite: an update, a
    schedule or a share that is one has no meaning, whatever the field.

    Raises:
        ValueError: with the field, the value and what is allowed.
    """
    for field, hint in typed_fields(type(config)):
        value = getattr(config, field.name)
        if value is None and optional(hint):
            continue
        kind = plain_type(hint)
        if kind is float and type(value) is int:
            value = float(value)
            object.__setattr__(config, field.name, value)
        if type(value) is not kind:
            raise ValueError(f"{field.name} = {value!r} is a {type(value).__name__}; give a {kind.__name__}.")
        _check_limits(field.name, value, field.metadata)
        _check_writable(field.name, value)


_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "minimum": ("at least", operator.ge),
    "above": ("more than", operator.gt),
    "maximum": ("at most", operator.le),
    "below": ("less than", operator.lt),
}


def _check_limits(name: str, value: Any, limits: typing.Mapping[str, Any]) -> None:
    choices = limits["choices"]
    if choices and value not in choices:
        choices = [str(choice) for choice in choices]
        close = get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"{name} = {value!r} is not known; choose one of {', '.join(choices)}{hint}")
    for name_of_bound, (words, holds) in _BOUNDS.items():
        bound = limits[name_of_bound]
        if bound is not None and not holds(value, bound):  # a NaN holds none of them
            raise ValueError(f"{name} = {value!r} is out of range; it must be {words} {bound}.")


def _check_writable(name: str, value: Any) -> None:
    """What no file can hold in such a way that it is read back as what it was."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} = {value!r} is not finite; give a finite number.")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:  # bytes of the command line or of a file's name
            raise ValueError(f"{name} = {value!r} is no valid UTF-8; rename what it names.") from error


def typed_fields(config: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a configuration class, each with its resolved type hint."""
    hints = typing.get_type_hints(config)
    return [(field, hints[field.name]) for field in dataclasses.fields(config)]


def optional(hint: Any) -> bool:
    """Whether a type hint allows None."""
    return types.NoneType in typing.get_args(hint)


def plain_type(hint: Any) -> type:
    """The type behind ``X | None``, and X itself otherwise."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    kind: type = kinds[0] if kinds else hint
    return kind


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ValueError: when it cannot be read or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file by a mark
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(
            f"config = {str(path)!r} cannot be read as TOML: {error}. Give a readable TOML file."
        ) from error


def write_toml(sections: dict[str, dict[str, Any]]) -> str:
    """Sections of plain settings as TOML text. A setting that is None is left out.

    >>> print(write_toml({"data": {"seq": 256, "data": "stdlib", "tokenizer": None}}))
    [data]
    seq = 256
    data = "stdlib"
    <BLANKLINE>
    """
    plain = {
        name: {key: value for key, value in section.items() if value is not None} for name, section in sections.items()
    }
    return tomli_w.dumps(plain)
