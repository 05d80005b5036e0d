"""`param_groups`: from a model to the parameter groups of a GaLore optimizer.

Which modules are projected follows the rules of Transformers' `optim_target_modules`: a list matches by substring, then
by full regular expression; a string is a regular expression for the whole name, or "all-linear". As in the paper, the
default is the linear layers of attention and MLP; embeddings, head, norms and biases are not projected.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from galore_torch.optim.groups import PROJECTED_DEFAULTS, check_group, is_projected, projection_in


def param_groups(  # noqa: PLR0913 (a group's keys, spelled out)
    model: nn.Module,
    rank: int,
    target_modules: str | Sequence[str] = ("attn", "mlp"),
    *,
    update_proj_gap: int = PROJECTED_DEFAULTS["update_proj_gap"],
    scale: float = PROJECTED_DEFAULTS["scale"],
    proj_type: str = PROJECTED_DEFAULTS["proj_type"],
    decomposition: str = PROJECTED_DEFAULTS["decomposition"],
    stagger: bool = PROJECTED_DEFAULTS["stagger"],
    weight_decay: float | None = None,
    summary: bool = False,
) -> list[dict[str, Any]]:
    """Splits a model's trainable parameters into groups that are projected and groups that are not.

    Every trainable parameter is in exactly one group; frozen ones are left out; a tied weight counts once, and is not
    projected if a module other than a target uses it too (an embedding, say). Projected are `nn.Linear`, GPT-2's
    `Conv1D`, and three-dimensional expert weights, one basis per expert.

    Args:
        model: the model.
        rank: rank of the projection, at least 1.
        target_modules: which modules, by the rules above.
        update_proj_gap: steps between two renewals of a basis.
        scale: factor of the projected update.
        proj_type: `std`, `reverse_std`, `left`, `right` or `full`.
        decomposition: `svd`, `randomized`, `warm` or `random`.
        stagger: let the layers take turns to renew.
        weight_decay: decay of matrices. Norms, biases and other vectors then go to a group without decay. None leaves
            decay to the optimizer's own argument, for all.
        summary: print what is projected, and the optimizer state against plain AdamW's.

    Returns:
        Parameter groups with `params` and `param_names`, the projected ones first.

    Raises:
        ValueError: no module matches (the message lists what could), or a value out of range.

    Example:
        >>> model = nn.ModuleDict({"mlp": nn.Linear(32, 64), "head": nn.Linear(64, 8)})
        >>> [(group["param_names"], group.get("rank")) for group in param_groups(model, rank=4)]
        [(['mlp.weight'], 4), (['mlp.bias', 'head.weight', 'head.bias'], None)]
    """
    keys = {
        "rank": rank,
        "update_proj_gap": update_proj_gap,
        "scale": scale,
        "proj_type": proj_type,
        "decomposition": decomposition,
        "stagger": stagger,
    }
    for target in [target_modules] if isinstance(target_modules, str) else target_modules:
        _check_pattern(target)
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    targets = _targets(model, target_modules)
    if not targets.keys() & trainable.keys():
        raise ValueError(_nothing_matched(model, target_modules, frozen=bool(targets)))

    buckets: dict[tuple[bool, bool, bool], list[str]] = {}
    for name, weight in trainable.items():
        decays = weight_decay is None or _is_matrix(model, name, weight)
        buckets.setdefault((name not in targets, weight.dim() > 2, not decays), []).append(name)
    groups = []
    for (plain, stacked, undecayed), names in sorted(buckets.items()):
        group: dict[str, Any] = {"params": [trainable[name] for name in names], "param_names": names}
        if not plain:
            group |= {**keys, "layout": "stack"} if stacked else keys
        if weight_decay is not None:
            group["weight_decay"] = 0.0 if undecayed else weight_decay
        check_group(group)
        groups.append(group)
    groups = _merge_plain(groups)
    if summary:
        print(summarize(groups))
    return groups


def summarize(groups: Sequence[dict[str, Any]]) -> str:
    """A table of what is projected, with the bytes of optimizer state against plain AdamW's.

    Args:
        groups: parameter groups, from `param_groups` or an optimizer.

    Returns:
        Some lines of text. State is counted as two moments in each weight's dtype, and the basis.
    """
    rows: list[tuple[str, int, int, int, int]] = []
    for group in groups:
        weights = group["params"]
        elements = sum(weight.numel() for weight in weights)
        plain_bytes = sum(2 * weight.numel() * weight.element_size() for weight in weights)
        complete = {**PROJECTED_DEFAULTS, **group}
        ours_bytes = sum(projection_in(complete, w).state_elements * w.element_size() for w in weights)
        kind = f"rank {group['rank']}" if is_projected(group) else "not projected"
        kind += " (experts)" if group.get("layout") == "stack" else ""
        rows.append((kind, len(weights), elements, ours_bytes, plain_bytes))
    tensors, elements, ours, plain = (sum(column) for column in list(zip(*rows, strict=True))[1:])
    rows.append(("all", tensors, elements, ours, plain))
    lines = [f"{'parameters':<20}{'tensors':>8}{'elements':>16}{'GaLore state':>14}{'AdamW state':>14}{'saved':>8}"]
    for kind, tensors, elements, ours, plain in rows:
        saved = f"{1 - ours / plain:.1%}" if plain else "-"
        lines.append(f"{kind:<20}{tensors:>8}{elements:>16,}{_readable(ours):>14}{_readable(plain):>14}{saved:>8}")
    return "\n".join(lines)


def _readable(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size >= 1024:
            size, unit = size / 1024, larger
    return f"{size:.1f} {unit}"


def _targets(model: nn.Module, target_modules: str | Sequence[str]) -> dict[str, Tensor]:
    """The weights of the matching modules by the name that `named_parameters` gives them, unless others use them."""
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for module_name, module, _, weight in _owned(model):
        users.setdefault(id(weight), []).append((module_name, module))
    first_names = {id(weight): name for name, weight in model.named_parameters()}
    found, shared, unsuited = {}, [], []
    for module_name, module, attribute, weight in _owned(model):
        if not _matches(module_name, target_modules):
            continue
        if not _is_projectable(module, attribute, weight):
            if weight.dim() > 1 and not _is_all_linear(target_modules):
                unsuited.append(f"{module_name}.{attribute}")
            continue
        if all(_is_projectable(user, attribute, weight) for _, user in users[id(weight)]):
            found[first_names[id(weight)]] = weight
        else:
            shared.append(module_name)
    if shared or unsuited:
        why = [f"{name} (its weight is tied to a module that is not linear)" for name in _kinds(shared)]
        why += [f"{name} (not of a linear layer)" for name in _kinds(unsuited)]
        warnings.warn(f"matched, but not projected: {', '.join(why)}", stacklevel=3)
    return found


def _owned(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every module's own parameters, tied ones once for each owner."""
    for module_name, module in model.named_modules():
        for attribute, weight in module.named_parameters(recurse=False):
            yield module_name, module, attribute, weight


def _is_projectable(module: nn.Module, attribute: str, weight: Tensor) -> bool:
    is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # Transformers', without its import
    if is_linear:
        return attribute == "weight" and weight.dim() == 2
    # A stack of experts; a tensor of one row or one matrix is a token or a table of positions.
    is_convolution = isinstance(module, nn.modules.conv._ConvNd)
    return weight.dim() == 3 and 1 not in weight.shape and not is_convolution


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


def _nothing_matched(model: nn.Module, target_modules: str | Sequence[str], *, frozen: bool) -> str:
    could = [name for name, module, attribute, weight in _owned(model) if _is_projectable(module, attribute, weight)]
    if frozen:
        return f"target_modules {target_modules!r} match frozen weights only; set requires_grad, or choose others"
    if not could:
        return "the model has no linear layer to project; GaLore needs nn.Linear, Conv1D or expert weights"
    kinds = _kinds(could)
    shown = ", ".join(kinds[:20]) + (f", and {len(kinds) - 20} more" if len(kinds) > 20 else "")
    return f'target_modules {target_modules!r} match no linear layer. These could be named: {shown}; or "all-linear"'


def _kinds(names: Sequence[str]) -> list[str]:
    """Names with `*` for their numbers, each once: a deep model has as many as a shallow one."""
    return sorted({re.sub(r"\d+", "*", name) for name in names})


def _is_matrix(model: nn.Module, name: str, weight: Tensor) -> bool:
    """Whether a parameter multiplies vectors; experts' biases and norms over several axes have two dimensions too."""
    module_name, _, attribute = name.rpartition(".")
    is_norm = "norm" in type(model.get_submodule(module_name)).__name__.lower()
    return weight.dim() > 1 and not is_norm and "bias" not in attribute


def _merge_plain(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups that are not projected differ in decay alone; the rest of the split serves the projected ones."""
    merged: dict[Any, dict[str, Any]] = {}
    for place, group in enumerate(groups):
        key = place if is_projected(group) else ("plain", group.get("weight_decay"))
        if key in merged:
            merged[key]["params"] += group["params"]
            merged[key]["param_names"] += group["param_names"]
        else:
            merged[key] = group
    return list(merged.values())
