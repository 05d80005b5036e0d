"""Which modules are meant: the rules of Transformers' `optim_target_modules`.

A list matches by substring, then by full regular expression; a string is a regular expression for the whole name, or
"all-linear".
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

Suits = Callable[[nn.Module, str, Tensor], bool]
"""Whether a module's parameter, by its attribute, can be served."""


def find_targets(model: nn.Module, target_modules: str | Sequence[str], suits: Suits, done: str) -> dict[str, Tensor]:
    """The weights of the matching modules, unless modules that do not suit use them too.

    A tied weight counts once. What matches and is left out is told in one warning.

    Args:
        model: the model.
        target_modules: which modules, by the rules above.
        suits: which of their parameters can be served.
        done: what is done with them, for messages, such as "projected".

    Returns:
        Weights by the name that `named_parameters` gives them.

    Raises:
        ValueError: no module matches, or a pattern is no regular expression.
    """
    for target in [target_modules] if isinstance(target_modules, str) else target_modules:
        _check_pattern(target)
    users: dict[int, list[nn.Module]] = {}
    for _, module, _, weight in owned(model):
        users.setdefault(id(weight), []).append(module)
    first_names = {id(weight): name for name, weight in model.named_parameters()}
    found, shared, unsuited = {}, [], []
    for module_name, module, attribute, weight in owned(model):
        if not _matches(module_name, target_modules):
            continue
        if not suits(module, attribute, weight):
            if weight.dim() > 1 and not _is_all_linear(target_modules):
                unsuited.append(f"{module_name}.{attribute}")
            continue
        if all(suits(user, attribute, weight) for user in users[id(weight)]):
            found[first_names[id(weight)]] = weight
        else:
            shared.append(module_name)
    if shared or unsuited:
        why = [f"{name} (its weight is tied to a module that is not linear)" for name in _kinds(shared)]
        why += [f"{name} (not of a linear layer)" for name in _kinds(unsuited)]
        warnings.warn(f"matched, but not {done}: {', '.join(why)}", stacklevel=3)
    if not found:
        raise ValueError(_nothing_matched(model, target_modules, suits, done))
    return found


def owned(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every module's own parameters, tied ones once for each owner.

    Args:
        model: the model.

    Yields:
        The module's name, the module, the attribute and the parameter.
    """
    for module_name, module in model.named_modules():
        for attribute, weight in module.named_parameters(recurse=False):
            yield module_name, module, attribute, weight


def _is_all_linear(target_modules: str | Sequence[str]) -> bool:
    return isinstance(target_modules, str) and target_modules.replace("_", "-") == "all-linear"


def _matches(name: str, target_modules: str | Sequence[str]) -> bool:
    if _is_all_linear(target_modules):
        return True
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(target in name or re.fullmatch(target, name) is not None for target in target_modules)


def _check_pattern(target: str) -> None:
    try:
        re.compile(target)
    except re.error as error:
        raise ValueError(
            f"target_modules has {target!r}, which is no regular expression ({error}). Parts of names, such as "
            '"attn", go into a list as they are; any text in a pattern is ".*"'
        ) from None


def _nothing_matched(model: nn.Module, target_modules: str | Sequence[str], suits: Suits, done: str) -> str:
    could = [name for name, module, attribute, weight in owned(model) if suits(module, attribute, weight)]
    if not could:
        return f"the model has no linear layer that could be {done}"
    kinds = _kinds(could)
    shown = ", ".join(kinds[:20]) + (f", and {len(kinds) - 20} more" if len(kinds) > 20 else "")
    return f'target_modules {target_modules!r} match no linear layer. These could be named: {shown}; or "all-linear"'


def _kinds(names: Sequence[str]) -> list[str]:
    """Names with `*` for their numbers, each once: a deep model has as many as a shallow one."""
    return sorted({re.sub(r"\d+", "*", name) for name in names})
