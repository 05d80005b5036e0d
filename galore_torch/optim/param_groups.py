"""`param_groups`: from a model to the parameter groups of a GaLore optimizer.

Which modules are projected follows the rules of `targets`. As in the paper, the default is the linear layers of
attention and MLP; embeddings, head, norms and biases are not projected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from galore_torch.optim.adapters import leave_out_adapters
from galore_torch.optim.groups import PROJECTED_DEFAULTS, check_group, is_projected, projection_in
from galore_torch.optim.targets import find_targets


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
    basis_bits: int = PROJECTED_DEFAULTS["basis_bits"],
    cos_threshold: float | None = PROJECTED_DEFAULTS["cos_threshold"],
    gamma_proj: float = PROJECTED_DEFAULTS["gamma_proj"],
    queue_size: int = PROJECTED_DEFAULTS["queue_size"],
    weight_decay: float | None = None,
    project_adapters: bool = False,
    summary: bool = False,
) -> list[dict[str, Any]]:
    """Splits a model's trainable parameters into groups that are projected and groups that are not.

    Every trainable parameter is in exactly one group; frozen ones are left out; a tied weight counts once, and is not
    projected if a module other than a target uses it too (an embedding, say). Projected are `nn.Linear`, GPT-2's
    `Conv1D`, and three-dimensional expert weights, one basis per expert.

    Args:
        model: the model.
        rank: rank of the projection, at least 1.
        target_modules: which modules: a list matches names by substring, then by full regular expression; a string is a
            regular expression for the whole name, or "all-linear".
        update_proj_gap: steps between two renewals of a basis.
        scale: factor of the projected update.
        proj_type: `std`, `reverse_std`, `left`, `right` or `full`.
        decomposition: `svd`, `randomized`, `warm` or `random`.
        stagger: let the layers take turns to renew.
        basis_bits: 16 for bases in the weight's dtype, 8 or 4 for codes.
        cos_threshold: renew lazily: a layer's gap grows while successive subspaces overlap by this much on average,
            from 0 (as random ones do) to 1. None: every `update_proj_gap` steps.
        gamma_proj: factor by which a lazy layer's gap grows, and shrinks again where its subspace moves.
        queue_size: how many of the last overlaps are averaged.
        weight_decay: decay of matrices. Norms, biases and other vectors then go to a group without decay. None leaves
            decay to the optimizer's own argument, for all.
        project_adapters: treat the matrices of adapters (PEFT's LoRA) as any others. By default they are trained, but
            not projected, for their rank is low already; and a model whose targets adapters have frozen is refused.
        summary: print what is projected, and the optimizer state against plain AdamW's.

    Returns:
        Parameter groups with `params` and `param_names`, the projected ones first.

    Raises:
        ValueError: no module matches (the message lists what could), all that match are frozen, by adapters or
            otherwise, or a value out of range.

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
        "basis_bits": basis_bits,
        "cos_threshold": cos_threshold,
        "gamma_proj": gamma_proj,
        "queue_size": queue_size,
    }
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    targets = find_targets(model, target_modules, _is_projectable, "projected")
    if not project_adapters:
        targets = leave_out_adapters(model, targets, target_modules)
    if not targets.keys() & trainable.keys():
        raise ValueError(
            f"target_modules {target_modules!r} match frozen weights only; set requires_grad, or choose others"
        )

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


def _is_projectable(module: nn.Module, attribute: str, weight: Tensor) -> bool:
    is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # Transformers', without its import
    if is_linear:
        return attribute == "weight" and weight.dim() == 2
    # A stack of experts; a tensor of one row or one matrix is a token or a table of positions.
    is_convolution = isinstance(module, nn.modules.conv._ConvNd)
    return weight.dim() == 3 and 1 not in weight.shape and not is_convolution


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
