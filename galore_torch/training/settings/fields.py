"""Settings: declared once as fields of a frozen dataclass, which pydantic checks whenever one is made; each is a flag.

A field carries its type, default, limits and help; flags, ``--config`` and Python are judged by the same words.
"""

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar

import pydantic
import typer
from pydantic.dataclasses import dataclass as checked_dataclass
from typing_extensions import dataclass_transform

from galore_torch.group_keys import KEYS

T = TypeVar("T")
DType = typing.Literal["float32", "bfloat16"]
Parallel = typing.Literal["ddp", "fsdp"]
Purpose = typing.Literal["train", "evaluate", "predict"]


def setting(default: Any, help: str, *, default_help: str | None = None, **limits: Any) -> Any:
    """Declare one setting as a field.

    Args:
        default: its value when nobody says otherwise; None where something else decides (the help says what).
        help: one or two sentences for ``--help``, with the unit.
        default_help: what ``--help`` says of the default, where that is not the default itself.
        limits: bounds of a number, by pydantic's names: ge, gt, le, lt, multiple_of.

    Returns:
        The field.
    """
    return pydantic.Field(default, description=help, json_schema_extra={"help": default_help}, **limits)


def group_setting(name: str, **other: Any) -> Any:
    """A key of a projected group as a setting: default, help and limits are those of `galore_torch.group_keys.KEYS`."""
    key = KEYS[name]
    return setting(**{"default": key.default, "help": key.help, **(key.limits or {}), **other})


_CHECKS = pydantic.ConfigDict(strict=True, allow_inf_nan=False, str_min_length=1, validate_default=True)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(kind: type[T]) -> type[T]:
    """Make a frozen, keyword-only dataclass that holds every field to its type and limits when it is made.

    Whole numbers are accepted where a float is asked for. No float is infinite: an update, a schedule or a share that
    is one has no meaning, whatever the field.

    Raises:
        ValueError: (the class) with the field, the value and what is allowed.
    """
    checked: Any = checked_dataclass(frozen=True, kw_only=True, config=_CHECKS)(kind)
    initialize = checked.__init__

    def initialized(self: Any, **given: Any) -> None:
        try:
            initialize(self, **given)
        except pydantic.ValidationError as error:
            raise ValueError(_sentence(checked, error)) from None

    checked.__init__ = initialized
    section: type[T] = checked
    return section


@settings
class RunConfig:
    """What all jobs have."""

    gradient_checkpointing: bool = setting(
        False, "Keep no activations inside the layers: the backward computes them again, in a third more time."
    )
    push_to_hub: str | None = setting(
        None, "Repository of the Hugging Face Hub that the finished model is uploaded to; made if it is not there."
    )
    report_to: str = setting("none", "Trackers to report to by comma, as Trainer names them: wandb, tensorboard, ...")


_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than", "multiple_of": "a multiple of"}


def _sentence(kind: Any, error: pydantic.ValidationError) -> str:
    """The first error in the project's form: field, value, remedy."""
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    if "error" in context:  # raised by `__post_init__`, in this form already
        return str(context["error"])
    name, value = str(first["loc"][0]), first["input"]
    if name not in field_names(kind):
        return f"{name} = {value!r} is not a setting; {suggest(name, field_names(kind))}"
    hint = typing.get_type_hints(kind)[name]
    if first["type"] == "literal_error":
        choices = [str(choice) for choice in choices_of(hint)]
        close = get_close_matches(str(value), choices, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else "."
        return f"{name} = {value!r} is not known; choose one of {', '.join(choices)}{meant}"
    if first["type"] == "finite_number":
        above = [limit.gt for limit in kind.__pydantic_fields__[name].metadata if hasattr(limit, "gt")]
        return f"{name} = {value!r} is not finite; give a finite number{f' more than {above[0]}' if above else ''}."
    if first["type"] == "string_unicode":  # bytes of the command line that no file of settings can hold
        return f"{name} = {value!r} is no valid UTF-8; rename what it names."
    if first["type"] == "string_too_short":
        default = kind.__pydantic_fields__[name].default
        return f"{name} = {value!r} names nothing; leave it out{f' for {default}' if default else ''}, or give one."
    for bound in _BOUNDS.keys() & context.keys():
        return f"{name} = {value!r} is out of range; it must be {_BOUNDS[bound]} {context[bound]}."
    wanted = plain_type(hint).__name__
    return f"{name} = {value!r} is a {type(value).__name__}; give {'an' if wanted == 'int' else 'a'} {wanted}."


def field_names(*kinds: type) -> list[str]:
    """The names of the settings of these dataclasses."""
    return [field.name for kind in kinds for field in dataclasses.fields(kind)]


def require_defaults(config: Any, by: str, only: Mapping[str, Collection[Any]]) -> None:
    """Refuse settings of a section that are not as by default though they have no effect.

    Args:
        config: the section.
        by: the setting that decides whether they have one.
        only: the values of that setting with which each of them has.

    Raises:
        ValueError: with the setting, its value and the remedy.
    """
    for name, values in only.items():
        value, chosen = getattr(config, name), getattr(config, by)
        if chosen not in values and value != config.__pydantic_fields__[name].default:
            few = f"{by} = {' or '.join(map(repr, values))}"
            need = few if len(values) <= 3 else f"one of {', '.join(map(str, values))}"
            raise ValueError(
                f"{name} = {value!r} has no effect with {by} = {chosen!r}; leave it out, or choose {need}."
            )


def require_once(name: str, values: Sequence[Any]) -> None:
    """Refuse, with a ValueError, values of a repeated option two of which are the same."""
    twice = next((value for place, value in enumerate(values) if value in values[:place]), None)
    if twice is not None:
        raise ValueError(f"{name} = {twice!r} is given twice; leave out one.")


def choices_of(hint: Any) -> tuple[Any, ...]:
    """The values that a type hint allows, if it is a Literal or one or None; else none.

    >>> choices_of(DType | None)
    ('float32', 'bfloat16')
    """
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    return tuple(choice for part in typing.get_args(hint) for choice in choices_of(part))


def plain_type(hint: Any) -> type:
    """The type of a setting's values, None and Literal apart.

    >>> plain_type(DType | None), plain_type(float | None), plain_type(int)
    (<class 'str'>, <class 'float'>, <class 'int'>)
    """
    choices = choices_of(hint)
    kinds = [type(choices[0])] if choices else [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    kind: type = kinds[0] if kinds else hint
    return kind


def suggest(name: str, known: Collection[str], shown: Callable[[str], str] = str) -> str:
    """What to say of a name that is not known: the closest one that is, or all of them."""
    close = get_close_matches(name, known, n=1)
    return f"did you mean {shown(close[0])}?" if close else f"choose one of {', '.join(known)}."


Presets = Mapping[str, Mapping[str, Any]]
_NO = "no_"
_METAVARS = {int: "N", float: "X", str: "TEXT", bool: ""}


def with_settings(
    command: Callable[..., None],
    sections: Mapping[str, type],
    presets: Presets,
    help_preset: str = "",
    hidden: Collection[str] = (),
) -> Callable[..., None]:
    """Give a command one optional flag a setting.

    Args:
        command: takes its own options and, as ``**given``, the settings by name; one that was not given is None. An
            option of its own that is named as a setting takes the setting's place, and so does a section before.
        sections: the dataclass of each section by its name.
        presets: what presets set, by their names.
        help_preset: the preset whose values the help shows.
        hidden: options of its own and settings that are not offered.

    Returns:
        The command itself, with the flags in its signature, which typer reads.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [one for one in own if one.kind is not inspect.Parameter.VAR_KEYWORD and one.name not in hidden]
    taken = {*hidden, *(parameter.name for parameter in parameters)}
    for kind, option in (typing.get_args(parameter.annotation) for parameter in parameters):
        option.metavar = "" if kind is bool else option.metavar
    for section, config in sections.items():
        kinds = typing.get_type_hints(config)
        for name in sorted(field_names(config), key=lambda name: name not in config.__annotations__):  # its own first
            if name not in taken:
                taken.add(name)
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
        own = presets[preset].get(name, field.default)
        return rf" [dim]\[by preset{'' if own is None else f'; {preset}: {own}'}][/]"
    default = field.json_schema_extra["help"] or field.default
    return "" if default is None else rf" [dim]\[default: {default}][/]"
