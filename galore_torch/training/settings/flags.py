"""Every setting as a command-line flag, whose help is the setting's."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from galore_torch.training.settings.fields import field_names, plain_type

Presets = Mapping[str, Mapping[str, Any]]
_NO = "no_"
_METAVARS = {int: "N", float: "X", str: "TEXT", bool: None}


def with_settings(
    command: Callable[..., None], sections: Mapping[str, type], presets: Presets, help_preset: str = ""
) -> Callable[..., None]:
    """Give a command one optional flag a setting.

    Args:
        command: takes its own options and, as ``**given``, the settings by name; one that was not given is None. An
            option of its own that is named as a setting takes the setting's place.
        sections: the dataclass of each section by its name.
        presets: what presets set, by their names.
        help_preset: the preset whose values the help shows.

    Returns:
        The command itself, with the flags in its signature, which typer reads.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    taken = {parameter.name for parameter in parameters}
    for section, config in sections.items():
        kinds = typing.get_type_hints(config)
        for name in field_names(config):
            if name not in taken:
                parameters += _flags(section, config, name, plain_type(kinds[name]), presets, help_preset)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def given_settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given, by name, from all flags of a command.

    >>> given_settings({"rank": 8, "scale": None, "stagger": None, "no_stagger": True})
    {'rank': 8, 'stagger': False}
    """
    given = {name: value for name, value in flags.items() if value is not None}
    return {name.removeprefix(_NO): False if name.startswith(_NO) else value for name, value in given.items()}


def _flags(
    section: str, config: Any, name: str, kind: type, presets: Presets, help_preset: str
) -> list[inspect.Parameter]:
    """A setting's flag; that of a boolean has another one that says no, in a row of its own: names may be long."""
    flag, field = name.replace("_", "-"), config.__pydantic_fields__[name]
    rows = [(name, f"--{flag}", field.description + _default(name, field, presets, help_preset))]
    rows += [(_NO + name, f"--no-{flag}", f"Turns --{flag} off.")] if kind is bool else []
    shown: dict[str, Any] = {"rich_help_panel": section.capitalize(), "show_default": False, "metavar": _METAVARS[kind]}
    # One of these types or None: typer reads it, no type checker does.
    options: Any = [(name, Annotated[kind | None, typer.Option(flag, help=help, **shown)]) for name, flag, help in rows]
    only = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(name, only, default=None, annotation=annotation) for name, annotation in options]


def _default(name: str, field: Any, presets: Presets, preset: str) -> str:
    """What a help text says of the default: that the preset decides, or the value."""
    if any(name in values and values[name] != field.default for values in presets.values()):
        return rf" [dim]\[by preset; {preset}: {presets[preset].get(name, field.default)}][/]"
    default = field.json_schema_extra["help"] or field.default
    return "" if default is None else rf" [dim]\[default: {default}][/]"
