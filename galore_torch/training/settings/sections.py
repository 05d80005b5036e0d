"""Sections of settings: from names to their dataclasses, and from a TOML file to names."""

import dataclasses
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from galore_torch.training.settings.fields import read_toml


def made(values: Mapping[str, Any], kinds: Mapping[str, type], job: str) -> dict[str, Any]:
    """Make every section from settings by name, whatever their section.

    Args:
        values: the settings.
        kinds: the dataclass of each section by its name.
        job: what they are settings of, for messages.

    Raises:
        ValueError: when a name is unknown or a value is not allowed.
    """
    home = {field.name: section for section, kind in kinds.items() for field in dataclasses.fields(kind)}
    sections: dict[str, dict[str, Any]] = {section: {} for section in kinds}
    for name, value in values.items():
        if name not in home:
            raise ValueError(f"{name} = {value!r} is no setting of {job}; {suggest(name, home)}")
        sections[home[name]][name] = value
    return {section: kinds[section](**given) for section, given in sections.items()}


def read_values(path: Path, kinds: Mapping[str, type]) -> tuple[str | None, dict[str, Any]]:
    """What a TOML file gives: the ``preset`` that it names before its sections, if any, and the settings by name.

    Raises:
        ValueError: when the file cannot be read or a setting stands in the wrong section.
    """
    sections = read_toml(path)
    preset = sections.pop("preset", None)
    values: dict[str, Any] = {}
    for section, given in sections.items():
        if section not in kinds or not isinstance(given, dict):
            known = ", ".join(f"[{name}]" for name in kinds)
            raise ValueError(f"{section} = {given!r} in {path} is no section; settings stand under {known}.")
        known_names = {field.name for field in dataclasses.fields(kinds[section])}
        for name, value in given.items():
            if name not in known_names:
                raise ValueError(
                    f"{name} = {value!r} in {path} is no setting of [{section}]; {suggest(name, known_names)}"
                )
            values[name] = value
    return preset, values


def suggest(name: str, known: Iterable[str]) -> str:
    """What to say of a setting that is not known: the closest one that is, or all of them."""
    close = get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}."
