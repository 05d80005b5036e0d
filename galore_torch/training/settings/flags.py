"""Every setting as a command-line flag, whose help is the setting's."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from galore_torch.training.settings.fields import plain_type, typed_fields

_OFF = "no_"

Presets = Mapping[str, Mapping[str, Any]]


def with_settings(
    command: Callable[..., None],
    sections: Mapping[str, type],
    presets: Presets,
    shown: str = "",
) -> Callable[..., None]:
    """Give a command one optional flag a setting.

    Args:
        command: takes its own options and, as ``**given``, the settings by name; one that was not given is None. An
            option of its own that is named as a setting takes the setting's place.
        sections: the dataclass of each section by its name.
        presets: what presets set, by their names.
        shown: the preset whose values the help shows.

    Returns:
        What typer makes a command of.
    """

    def run(**values: Any) -> None:
        for name in [name for name in values if name.startswith(_OFF)]:
            if values.pop(name):
                values[name.removeprefix(_OFF)] = False
        command(**values)

    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    taken = {parameter.name for parameter in parameters}
    for section, config in sections.items():
        settings = [(field, hint) for field, hint in typed_fields(config) if field.name not in taken]
        parameters += [_flag(section, field, hint, presets, shown) for field, hint in settings]
        parameters += [_off(section, field.name) for field, hint in settings if plain_type(hint) is bool]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = command.__doc__
    return run


def _flag(section: str, field: dataclasses.Field[Any], hint: Any, presets: Presets, preset: str) -> inspect.Parameter:
    kind = plain_type(hint)
    name = field.name.replace("_", "-")
    option = typer.Option(
        f"--{name}",
        help=field.metadata["help"] + _default(field, presets, preset),
        rich_help_panel=section.capitalize(),
        show_default=False,
        metavar=None if kind is bool else {int: "N", float: "X", str: "TEXT"}[kind],
    )
    # One of these types or None: typer reads it, no type checker does.
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _off(section: str, name: str) -> inspect.Parameter:
    """The flag that says no to a setting. One of its own, for two long names side by side leave help no room."""
    flag = name.replace("_", "-")
    option = typer.Option(f"--no-{flag}", help=f"Not --{flag}.", rich_help_panel=section.capitalize())
    return inspect.Parameter(
        _OFF + name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
    )


def _default(field: dataclasses.Field[Any], presets: Presets, preset: str) -> str:
    """What a help text says of the default: that the preset decides, or the value."""
    if any(field.name in values and values[field.name] != field.default for values in presets.values()):
        return rf" [dim]\[by preset; {preset}: {presets[preset].get(field.name, field.default)}][/]"
    shown = field.metadata["shown"] or field.default
    return "" if shown is None else rf" [dim]\[default: {shown}][/]"
