"""What is checked of an optimizer's arguments before anything is built: parameters, classes, and hyperparameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from galore_torch.messages import did_you_mean
from galore_torch.optim.groups import check_group, parameter_name
from galore_torch.values import is_number, is_whole, plain

_FROM_A_MODEL = "pass param_groups(model, rank=...), a list of parameters, or a list of groups"


def listed(params: Any) -> list[Any]:
    """The parameters or groups that an optimizer is given, each group's parameters in a list of their own.

    Args:
        params: parameters, (name, parameter) pairs or groups: any iterable with an order. A list is left as it is.

    Returns:
        A new list; generators have been used up for it.

    Raises:
        ValueError: no such thing; the message says what was given instead.
    """
    if _is_no_list(params):
        raise ValueError(f"params is a {type(params).__name__}; {_FROM_A_MODEL}")
    made = [{**one, "params": _of_group(one)} if isinstance(one, Mapping) else one for one in params]
    if not made:
        raise ValueError(
            "params is an empty parameter list (a generator, such as model.parameters(), can be read only once); "
            + _FROM_A_MODEL
        )
    of_groups = isinstance(made[0], dict)
    for index, one in enumerate(made):
        if not isinstance(one, dict) if of_groups else not isinstance(one, Tensor) and not _is_pair(one):
            raise ValueError(f"params[{index}] is {one!r}, a {type(one).__name__}; {_FROM_A_MODEL}")
    return made


def _is_no_list(given: Any) -> bool:
    """Whether something is not an iterable of parameters with an order, or is a model (some can be iterated over)."""
    unordered = isinstance(given, (Tensor, Mapping, str, set, frozenset)) or hasattr(given, "named_parameters")
    return unordered or not isinstance(given, Iterable)


def _of_group(group: Mapping[str, Any]) -> list[Any]:
    if "params" not in group:
        raise ValueError(
            f'a parameter group has no "params", but {", ".join(map(repr, group))}; list its parameters there'
        )
    given = group["params"]
    if isinstance(given, Tensor):
        return [given]
    if _is_no_list(given):
        raise ValueError(f'"params" of a parameter group is a {type(given).__name__}; use a list of parameters')
    return list(given)


def prepared(group: Mapping[str, Any], groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A group as an optimizer can take it, checked, with its parameters' names apart.

    Args:
        group: as it was given.
        groups: those that the optimizer has.

    Returns:
        A new dictionary. It has `param_names` if it was given any or the other groups have them.

    Raises:
        ValueError: what `check_group` says, or a parameter that another group holds.
    """
    made = _named(listed([group])[0], len(groups), needs_names=any("param_names" in other for other in groups))
    check_group(made)
    held = {id(weight) for other in groups for weight in other["params"]}
    for index, weight in enumerate(made["params"]):
        if id(weight) in held:
            raise ValueError(f"{parameter_name(made, index)} is in more than one parameter group; list it once")
    return made


def name_all(groups: Sequence[dict[str, Any]]) -> None:
    """Calls the parameters of groups without names by their places, for torch wants names for all groups or for none.

    Args:
        groups: of an optimizer; changed in place.
    """
    for place, group in enumerate(groups):
        group.setdefault("param_names", _places(place, len(group["params"])))


def _named(group: Mapping[str, Any], place: int, *, needs_names: bool) -> dict[str, Any]:
    pairs = [entry if _is_pair(entry) else (None, entry) for entry in group["params"]]
    given: Any = group.get("param_names")
    if given is not None and len(given) != len(pairs):
        raise ValueError(
            f'"param_names" has {len(given)} names for {len(pairs)} parameters; give one for each, or leave them out'
        )
    made = {**group, "params": [parameter for _, parameter in pairs]}
    names = [name for name, _ in pairs] if given is None else list(given)
    if needs_names or any(name is not None for name in names):
        positions = _places(place, len(pairs))
        made["param_names"] = [
            of_place if name is None else name for name, of_place in zip(names, positions, strict=True)
        ]
    return made


def _places(group: int, count: int) -> list[str]:
    return [f"param_groups.{group}.{index}" for index in range(count)]


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)


def checked_settings(**settings: Any) -> dict[str, Any]:
    """What a `GaLore` is built from, checked before anything is.

    Args:
        **settings: its arguments but the parameters; those of the optimizers inside under `arguments`.

    Returns:
        The settings, with Python's numbers in place of numpy's.

    Raises:
        ValueError: one that is not supported; the message names it, its value and the remedy.
    """
    made = {name: plain(value) for name, value in settings.items()}
    for name in ("optimizer_class", "fallback_class"):
        one = made[name]
        if not (one is None and name == "fallback_class") and not _is_class_of_optimizers(one):
            raise ValueError(
                f"{name} is {one!r}, a {type(one).__name__}; pass a class of optimizers itself, such as "
                f"{name}=torch.optim.SGD, and its arguments by name"
            )
    dtype, skip, seed = made["state_dtype"], made["skip_nonfinite"], made["seed"]
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"state_dtype is {dtype!r}; use torch.float32, torch.bfloat16, or None for the weight's own")
    if not isinstance(skip, bool):
        raise ValueError(f"skip_nonfinite is {skip!r}; use True or False")
    if not is_whole(seed, -(2**63)):
        raise ValueError(f"seed is {seed!r}; use a whole number")
    classes = [one for one in (made["optimizer_class"], made["fallback_class"]) if one is not None]
    arguments = made.pop("arguments")
    return {**made, "arguments": checked_arguments(classes, arguments, beside=made)}


def _is_class_of_optimizers(one: Any) -> bool:
    return isinstance(one, type) and issubclass(one, torch.optim.Optimizer)


def checked_arguments(
    classes: Sequence[type[torch.optim.Optimizer]], arguments: Mapping[str, Any], beside: Iterable[str]
) -> dict[str, Any]:
    """The arguments of the optimizers inside, with Python's numbers in place of numpy's.

    Args:
        classes: of one optimizer or two; an argument is for those that name it.
        arguments: by name.
        beside: names of the arguments that `GaLore` itself takes, which a wrong one may have meant.

    Returns:
        The arguments.

    Raises:
        ValueError: a name that none of them takes, or a value that cannot be right.
    """
    signatures = [inspect.signature(one).parameters for one in classes]
    takes_any = any(one.kind is one.VAR_KEYWORD for taken in signatures for one in taken.values())
    known = {name: taken[name].default for taken in signatures for name in taken if name not in ("self", "params")}
    made = {name: plain(value) for name, value in arguments.items()}
    for name, value in made.items():
        if name not in known and not takes_any:
            both = " and ".join(one.__name__ for one in classes)
            raise ValueError(f"{name}={value!r} is no argument of {both}; {did_you_mean(name, [*known, *beside])}")
    check_hyperparameters(made, known)
    return made


def share_arguments(classes: Sequence[type[torch.optim.Optimizer]], arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Which of the arguments each of one or two classes gets: all, if there is one; else those that it names.

    Args:
        classes: the optimizers.
        arguments: for both, by name.

    Returns:
        One dictionary for each class.

    Raises:
        ValueError: an argument that neither class names, or `maximize` for one of them alone.
    """
    if len(classes) == 1:
        return [arguments]
    shares = []
    for one in classes:
        named = inspect.signature(one).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in named.values())
        shares.append({key: value for key, value in arguments.items() if takes_any or key in named})
    others_descend = [one for one, share in zip(classes, shares, strict=True) if "maximize" not in share]
    if arguments.get("maximize") and others_descend:
        raise ValueError(
            f"maximize={arguments['maximize']!r} is no argument of {others_descend[0].__name__}, which would go down "
            "where the other goes up; leave it out and negate the loss"
        )
    unknown = arguments.keys() - shares[0].keys() - shares[1].keys()
    if unknown:
        both = " and ".join(one.__name__ for one in classes)
        raise ValueError(f"{both} have no argument named {', '.join(sorted(unknown))}; check the spelling")
    return shares


def check_hyperparameters(values: Mapping[str, Any], defaults: Mapping[str, Any], where: str = "") -> None:
    """Checks hyperparameters that all optimizers understand alike, and that no number is a string.

    Args:
        values: by name, as arguments or in a group.
        defaults: of each; one whose default is None may be None.
        where: which group, for messages.

    Raises:
        ValueError: naming the first that cannot be right.
    """
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, Tensor) or (value is None and default is None):
            continue
        if isinstance(value, str) and is_number(default):
            raise ValueError(f"{name} is {value!r}{where}, a string; use a number, such as {default!r}")
        if name in _LIMITS and (default in (None, inspect.Parameter.empty) or _LIMITS[name][0](default)):
            accepts, wanted = _LIMITS[name]
            if not accepts(value) or (_both_tuples(value, default) and len(value) != len(default or ())):
                raise ValueError(f"{name} is {value!r}{where}; use {wanted}")


def _both_tuples(value: Any, default: Any) -> bool:
    return isinstance(value, (tuple, list)) and isinstance(default, (tuple, list))


def _not_negative(value: Any) -> bool:
    return is_number(value) and value >= 0


def _is_eps(value: Any) -> bool:
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return all(part is None or _not_negative(part) for part in parts)


def _are_betas(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(
        part is None or isinstance(part, Tensor) or (is_number(part) and 0 <= part < 1) for part in value
    )


_LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_not_negative, "a learning rate of at least 0, such as 0.01"),
    "weight_decay": (_not_negative, "a number of at least 0, such as 0.1"),
    "momentum": (_not_negative, "a number of at least 0, such as 0.9"),
    "eps": (_is_eps, "a number of at least 0, such as 1e-8"),
    "betas": (_are_betas, "a tuple of decay rates from 0 to below 1, such as (0.9, 0.999)"),
}

HYPERPARAMETERS = tuple(_LIMITS)
"""Those that all optimizers understand alike."""
