"""Which modules match `target_modules`: Transformers' rules for `optim_target_modules`, and a default.

A list matches by substring, then by full regular expression; a string is a regular expression for the whole name, or
"all-linear". By default it is the modules of the model's repeated blocks, whatever their architecture calls
them, and those with `attn` or `mlp` in their names.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from galore_torch.messages import collapse_indices, list_names, warn

Suits = Callable[[nn.Module, str, Tensor], bool]
"""Whether a module's parameter, by its attribute, is supported."""

Targets = str | Sequence[str] | None
"""What `target_modules` may be."""

USUAL_PARTS = ("attn", "mlp")
"""The names that the ecosystem gives."""

_WITHOUT_MATRICES = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, nn.LayerNorm, nn.GroupNorm)
"""Modules of a block whose weights multiply no vector: they are not expected among linear layers."""


def find_targets(model: nn.Module, target_modules: Targets, suits: Suits, done: str) -> dict[str, Tensor]:
    """The weights of the matching modules, unless modules that do not suit use them too.

    A tied weight counts once. What matches and is left out is reported in one warning, and so are names that match
    nothing.

    Args:
        model: the model.
        target_modules: which modules, by the rules above.
        suits: which of their parameters is supported.
        done: what is done with them, for messages, such as "projected".

    Returns:
        Weights by the name that `named_parameters` gives them.

    Raises:
        ValueError: no module matches, a pattern is no regular expression, or the model is no module.
    """
    target_modules = _checked(target_modules)
    matches = _matcher(model, target_modules)
    users: dict[int, list[nn.Module]] = {}
    for _, module, _, weight in owned(model):
        users.setdefault(id(weight), []).append(module)
    first_names = {id(weight): name for name, weight in model.named_parameters()}
    found, shared, unsuited = {}, [], []
    for module_name, module, attribute, weight in owned(model):
        if not matches(module_name):
            continue
        if not suits(module, attribute, weight):
            if _is_missed(module, weight, target_modules):
                unsuited.append(f"{module_name}.{attribute}")
        elif all(suits(user, attribute, weight) for user in users[id(weight)]):
            found[first_names[id(weight)]] = weight
        else:
            shared.append(module_name)
    if shared or unsuited:
        why = [f"{name} (its weight is tied to a module that is not linear)" for name in collapse_indices(shared)]
        why += [f"{name} (not of a linear layer)" for name in collapse_indices(unsuited)]
        warn(f"matched, but not {done}: {', '.join(why)}")
    if not found:
        raise ValueError(_nothing_matched(model, target_modules, suits, done))
    _report_unmatched(model, target_modules, suits, done, reported=[*shared, *unsuited])
    return found


def owned(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every module's own parameters, tied ones once for each owner.

    Args:
        model: the model.

    Yields:
        The module's name, the module, the attribute and the parameter.

    Raises:
        ValueError: the model is no module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; pass the nn.Module itself, whose layers have names")
    for module_name, module in model.named_modules():
        for attribute, weight in module.named_parameters(recurse=False):
            yield module_name, module, attribute, weight


def block_names(model: nn.Module) -> list[str]:
    """The names of a model's repeated blocks: the layers of a transformer, the stages of a vision model.

    A block has modules of its own, and stands in a list: an `nn.ModuleList`, a numbered `nn.ModuleDict`, or an
    `nn.Sequential` that holds another one of its class.

    Args:
        model: the model.

    Returns:
        Names of modules; blocks inside a block are not named again.

    Example:
        >>> block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> block_names(nn.ModuleDict({"layers": nn.ModuleList([block]), "heads": nn.ModuleList([nn.Linear(4, 1)])}))
        ['layers.0']
    """
    found: list[str] = []
    inside: tuple[str, ...] = ()  # how names in the blocks so far begin
    for name, module in model.named_modules():
        if f"{name}.".startswith(inside):
            continue
        children = [(key, child) for key, child in module.named_children() if next(child.children(), None) is not None]
        if isinstance(module, nn.Sequential):
            count = Counter(type(child) for _, child in children)
            children = [(key, child) for key, child in children if count[type(child)] > 1]
        elif not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            children = []
        elif isinstance(module, nn.ModuleDict):
            children = [(key, child) for key, child in children if key.isdigit()]
        found += [f"{name}.{key}" if name else key for key, _ in children]
        inside += tuple(f"{block}." for block in found[len(inside) :])
    return found


def _checked(target_modules: Any) -> Targets:
    if target_modules is None:
        return None
    if not isinstance(target_modules, (str, list, tuple, set, frozenset)):
        raise ValueError(
            f"target_modules is {target_modules!r}, a {type(target_modules).__name__}; use a list of parts of names, "
            'such as ["attn", "mlp"], a regular expression, "all-linear", or leave it out'
        )
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    for target in targets:
        if not isinstance(target, str) or not target:
            raise ValueError(f'target_modules has {target!r}, which is no part of a name; use strings, such as "attn"')
        try:
            re.compile(target)
        except re.error as error:
            raise ValueError(
                f"target_modules has {target!r}, which is no regular expression ({error}). Parts of names, such as "
                '"attn", go into a list as they are; any text in a pattern is ".*"'
            ) from None
        if not isinstance(target_modules, str) and _is_all_linear(target):
            raise ValueError(f'target_modules has {target!r} in a list; give it alone: target_modules="all-linear"')
    return sorted(targets) if isinstance(target_modules, (set, frozenset)) else target_modules


def _is_all_linear(target_modules: Targets) -> bool:
    return isinstance(target_modules, str) and target_modules.replace("_", "-") == "all-linear"


def _matcher(model: nn.Module, target_modules: Targets) -> Callable[[str], bool]:
    """Whether a module's name matches."""
    if target_modules is None:
        blocks, heads = tuple(f"{name}." for name in block_names(model)), _head_names(model)
        return lambda name: (
            name not in heads and (f"{name}.".startswith(blocks) or any(part in name for part in USUAL_PARTS))
        )
    if _is_all_linear(target_modules):
        return lambda _: True
    if isinstance(target_modules, str):
        pattern = re.compile(target_modules)
        return lambda name: pattern.fullmatch(name) is not None
    return lambda name: any(_matches(name, target) for target in target_modules)


def _matches(name: str, target: str) -> bool:
    return target in name or re.fullmatch(target, name) is not None


def _head_names(model: nn.Module) -> set[str]:
    """The names of what a model of Transformers calls its output embeddings."""
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return set()
    return {name for name, module in model.named_modules() if module is head}


def _is_missed(module: nn.Module, weight: Tensor, target_modules: Targets) -> bool:
    """Whether to warn of a matching weight that is not supported: the more so, the closer it was named."""
    if target_modules is None:
        return (
            weight.dim() > 1
            and not isinstance(module, _WITHOUT_MATRICES)
            and "norm" not in type(module).__name__.lower()
        )
    if _is_all_linear(target_modules):
        return weight.dim() == 3 and 1 not in weight.shape and not isinstance(module, _WITHOUT_MATRICES)
    return weight.dim() > 1


def _report_unmatched(
    model: nn.Module, target_modules: Targets, suits: Suits, done: str, *, reported: Sequence[str]
) -> None:
    """Warns of names that match no layer although others do: a typing error, or the words of another architecture."""
    names = [name for name, module, attribute, weight in owned(model) if suits(module, attribute, weight)]
    parts = USUAL_PARTS if target_modules is None else () if isinstance(target_modules, str) else target_modules
    unmatched = [part for part in parts if not any(_matches(name, part) for name in (*names, *reported))]
    if not unmatched:
        return
    nothing = f"{' and '.join(map(repr, unmatched))} match{'' if len(unmatched) > 1 else 'es'} no linear layer"
    matches = _matcher(model, target_modules)
    left = [name for name in names if not matches(name)]
    if target_modules is None:
        chosen = list_names([name for name in names if matches(name)], 12)
        warn(
            f"target_modules is left out, and {nothing} of this {type(model).__name__}; the linear layers of its "
            f"repeated blocks are {done}: {chosen}" + (f". Not {done}: {list_names(left, 12)}" if left else "")
        )
        return
    words = sorted({word for name in names for part in name.split(".") for word in (part, *part.split("_"))})
    close = [near for part in unmatched for near in difflib.get_close_matches(part, words, 1)]
    meant = f"; did you mean {' and '.join(map(repr, close))}?" if close else "; name other parts, or leave it out."
    rest = f" Not {done}: {list_names(left, 12)}" if left else ""
    warn(f"target_modules: {nothing} of this {type(model).__name__}{meant}{rest}")


def what_holds(target_modules: Targets) -> str:
    """The beginning of a message about weights that were found.

    Args:
        target_modules: what they were found by.
    """
    if target_modules is None:
        return "the repeated blocks of the model hold"
    return f"target_modules {target_modules!r} match"


def _nothing_matched(model: nn.Module, target_modules: Targets, suits: Suits, done: str) -> str:
    could = [name for name, module, attribute, weight in owned(model) if suits(module, attribute, weight)]
    if not could:
        return f"the model has no linear layer that could be {done}"
    return (
        f'{what_holds(target_modules)} no linear layer. These could be named: {list_names(could, 20)}; or "all-linear"'
    )
