"""`param_groups`: from a model to the parameter groups of a GaLore optimizer.

Which modules are projected follows the rules of `targets`. As in the paper, the default is the linear layers of
attention and MLP; embeddings, head, norms and biases are not projected.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from galore_torch.group_keys import PROJECTED_DEFAULTS, checked_key
from galore_torch.messages import list_names
from galore_torch.modules import Suits, Targets, find_targets, owned, what_holds
from galore_torch.optim.arguments import check_hyperparameters
from galore_torch.optim.groups import check_group, is_projected, is_trainable, projection_in
from galore_torch.optim.rank_patterns import split_by_rank
from galore_torch.targets.adapters import leave_out_adapters
from galore_torch.targets.flattened import require_matrices
from galore_torch.units import readable
from galore_torch.values import is_number, plain


def param_groups(
    model: nn.Module,
    rank: int,
    target_modules: Targets = None,
    *,
    rank_pattern: Mapping[str, int] | None = None,
    weight_decay: float | None = None,
    others_lr: float | None = None,
    project_adapters: bool = False,
    summary: bool = False,
    **keys: Any,
) -> list[dict[str, Any]]:
    """Splits a model's trainable parameters into groups that are projected and groups that are not.

    Every trainable parameter is in exactly one group; frozen ones are left out; a tied weight counts once, and is not
    projected if a module other than a target uses it too (an embedding, say). Projected are `nn.Linear`, GPT-2's
    `Conv1D`, the input projections of `nn.MultiheadAttention`, and weights of three dimensions: of experts, one basis
    per expert, and of attention (d_model, heads, size of a head), each as one matrix.

    Args:
        model: the model.
        rank: rank of the projection, at least 1.
        target_modules: which modules: a list matches names by substring, then by full regular expression; a string is a
            regular expression for the whole name, or "all-linear". None: those of the model's repeated blocks (its
            layers, whatever the architecture calls them), and those with `attn` or `mlp` in their names; so embeddings,
            heads and what stands before or after the blocks are left out.
        rank_pattern: ranks of modules by their names, or by ends of these without the numbers of layers, such as
            {"q_proj": 32, "mlp.down_proj": 64}; the longest that fits counts, and others have `rank`. `choose_ranks`
            gives one.
        weight_decay: decay of matrices. Norms, biases and other vectors then go to a group without decay. None leaves
            decay to the optimizer's own argument, for all.
        others_lr: learning rate of what is not projected. None leaves it to the optimizer's own argument.
        project_adapters: treat the matrices of adapters (PEFT's LoRA) as any others. By default they are trained, but
            not projected, for their rank is low already; and a model whose targets adapters have frozen is an error.
        summary: print what is projected, and the optimizer state against plain AdamW's.
        **keys: further keys of the projected groups: `update_proj_gap`, `scale`, `proj_type` and all others that
            `GaLore` explains. A `layout` is for all weights of three dimensions among the targets but convolutions.

    Returns:
        Parameter groups with `params` and `param_names`, the projected ones first.

    Raises:
        ValueError: weights are not whole (FSDP1, DeepSpeed ZeRO 3), no module matches (the message lists what could),
            all that match are frozen, by adapters or otherwise, an unknown key, a name in `rank_pattern` that fits
            nothing, or a value out of range.

    Example:
        >>> model = nn.ModuleDict({"mlp": nn.Linear(32, 64), "head": nn.Linear(64, 8)})
        >>> [(group["param_names"], group.get("rank")) for group in param_groups(model, rank=4, target_modules=["mlp"])]
        [(['mlp.weight'], 4), (['mlp.bias', 'head.weight', 'head.bias'], None)]
    """
    layouts = _layouts(model, keys.get("layout"))
    require_matrices(model)
    keys = {name: checked_key(name, value) for name, value in {"rank": rank, **PROJECTED_DEFAULTS, **keys}.items()}
    weight_decay, others_lr = plain(weight_decay), plain(others_lr)
    _check_choices(weight_decay, others_lr, project_adapters=project_adapters, summary=summary)

    def suits(module: nn.Module, attribute: str, weight: Tensor) -> bool:
        return _is_linear(module, attribute, weight) or id(weight) in layouts

    targets = find_targets(model, target_modules, suits, "projected")
    if not project_adapters:
        targets = leave_out_adapters(model, targets, target_modules)
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not targets.keys() & trainable.keys():
        raise ValueError(_all_frozen(target_modules, list(targets.values())))

    buckets: dict[tuple[bool, str, bool], list[str]] = {}
    for name, weight in trainable.items():
        decays = weight_decay is None or _is_matrix(model, name, weight)
        buckets.setdefault((name not in targets, layouts.get(id(weight), ""), not decays), []).append(name)
    groups = []
    for (plainly, layout, undecayed), names in sorted(buckets.items()):
        group: dict[str, Any] = {"params": [trainable[name] for name in names], "param_names": names}
        if not plainly:
            group |= {**keys, "layout": layout or keys["layout"]}
        elif others_lr is not None:
            group["lr"] = others_lr
        if weight_decay is not None:
            group["weight_decay"] = 0.0 if undecayed else weight_decay
        check_group(group)
        groups.append(group)
    groups = _merge_plain(groups) if rank_pattern is None else split_by_rank(_merge_plain(groups), rank_pattern)
    if summary:
        print(summarize(groups))
        _print_left(model, suits, targets)
    return groups


def _show_keys() -> None:
    """Gives `param_groups` a signature that shows the declared keys by their names and defaults."""
    shown = inspect.signature(param_groups)
    fixed = [one for one in shown.parameters.values() if one.kind is not one.VAR_KEYWORD]
    further = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in PROJECTED_DEFAULTS.items()
    ]
    param_groups.__signature__ = shown.replace(parameters=[*fixed, *further])  # type: ignore[attr-defined]


_show_keys()


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
        lines.append(f"{kind:<20}{tensors:>8}{elements:>16,}{readable(ours):>14}{readable(plain):>14}{saved:>8}")
    return "\n".join(lines)


def _print_left(model: nn.Module, suits: Suits, targets: Mapping[str, Tensor]) -> None:
    projected = {id(weight) for weight in targets.values()}
    trained = [one for one in owned(model) if one[3].requires_grad and id(one[3]) not in projected]
    left = [name for name, module, attribute, weight in trained if suits(module, attribute, weight)]
    if left:
        print(f"Linear layers that are not projected: {list_names(left, 20)}")


def _check_choices(weight_decay: Any, others_lr: Any, **switches: Any) -> None:
    check_hyperparameters({"weight_decay": weight_decay}, {"weight_decay": None})
    if others_lr is not None and not (is_number(others_lr) and others_lr >= 0):
        raise ValueError(f"others_lr is {others_lr!r}; use a learning rate of at least 0, such as 0.001")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; use True or False")


def _all_frozen(target_modules: Targets, weights: Sequence[Tensor]) -> str:
    found = f"{what_holds(target_modules)} frozen weights only"
    if any(map(is_trainable, weights)):
        return f"{found}; set requires_grad, or choose others"
    return (
        f"{found}, codes of quantized layers ({weights[0].dtype}), which cannot be trained. Load the model without "
        "quantization (quantize_weights keeps INT8 weights that can be trained), or choose others"
    )


def _is_linear(module: nn.Module, attribute: str, weight: Tensor) -> bool:
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":  # Transformers', without its import
        return attribute == "weight" and weight.dim() == 2
    return isinstance(module, nn.MultiheadAttention) and attribute.endswith("proj_weight") and weight.dim() == 2


def _layouts(model: nn.Module, given: Any) -> dict[int, str]:
    """The layout of each weight of three dimensions that can be projected, by identity: `given`, or by what it is."""
    found = {}
    for name, module, attribute, weight in owned(model):
        # A tensor of one row or one matrix is a token or a table of positions.
        if weight.dim() != 3 or 1 in weight.shape or isinstance(module, nn.modules.conv._ConvNd):
            continue
        if given is not None:
            found[id(weight)] = given
        elif _is_of_experts(name, module, attribute, weight):
            found[id(weight)] = "stack"
        elif "attention" in type(module).__name__.lower() and weight.shape[0] > max(weight.shape[1:]):
            found[id(weight)] = "reshape"  # (model, heads, size of a head), as in XLNet: one matrix
    return found


def _is_of_experts(name: str, module: nn.Module, attribute: str, weight: Tensor) -> bool:
    """Whether a stack of matrices is one matrix for each expert: its names say so, or its module counts them."""
    counts = {value for key, value in vars(module).items() if "expert" in key and isinstance(value, int)}
    is_named_so = any("expert" in word.lower() for word in (name, attribute, type(module).__name__))
    return is_named_so or weight.shape[0] in counts


def _is_matrix(model: nn.Module, name: str, weight: Tensor) -> bool:
    """Whether a parameter multiplies vectors; experts' biases and norms over several axes have two dimensions too."""
    module_name, _, attribute = name.rpartition(".")
    is_norm = "norm" in type(model.get_submodule(module_name)).__name__.lower()
    return weight.dim() > 1 and not is_norm and "bias" not in attribute


def _merge_plain(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups that are not projected differ in decay alone; the rest of the split is for the projected ones."""
    merged: dict[Any, dict[str, Any]] = {}
    for place, group in enumerate(groups):
        key = place if is_projected(group) else ("plain", group.get("weight_decay"))
        if key in merged:
            merged[key]["params"] += group["params"]
            merged[key]["param_names"] += group["param_names"]
        else:
            merged[key] = group
    return list(merged.values())
