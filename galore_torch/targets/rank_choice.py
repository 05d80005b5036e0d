"""`choose_ranks`: the ranks that capture most of a model's gradients within some bytes of optimizer state."""

from __future__ import annotations

import math

from torch import Tensor, nn

from galore_torch.modules import Targets
from galore_torch.optim import ProjectedGradient
from galore_torch.optim.groups import is_projected, projection_in
from galore_torch.projection import Projection
from galore_torch.projection.rank_budget import ranks_within
from galore_torch.projection.spectra import Spectrum, gram, rank_that_holds
from galore_torch.targets.model_groups import param_groups
from galore_torch.values import is_number, is_whole, plain


def choose_ranks(
    model: nn.Module,
    budget: float,
    target_modules: Targets = None,
    *,
    energy: float = 0.95,
    multiple: int = 8,
    moments: int = 2,
) -> dict[str, int]:
    """Ranks by layer that capture most of the gradients that a model has, within some bytes of optimizer state.

    Each projected weight's gradient is decomposed, and bytes go where they add the largest share of a weight's energy,
    ||G||_F^2; all weights count alike, for an optimizer gives each updates of its own size. A gradient of few tokens
    holds the noise of its batch too: accumulate several, or let `galore inspect --state-budget` judge bases by later
    gradients.

    Args:
        model: after a backward pass, with full gradients.
        budget: bytes of bases and moments of all projected weights, in the weights' dtypes, projected as `std` does.
        target_modules: which modules are projected, as for `param_groups`.
        energy: share of its energy that is enough for a weight, above 0 and at most 1. What is not needed for that
            remains of the budget.
        multiple: ranks are multiples of it, or the shorter side.
        moments: numbers that the optimizer keeps of each coordinate: 2 of Adam, 1 of `GaLoreMuon`.

    Returns:
        Ranks by the names of modules, for `param_groups(rank_pattern=...)` and `lower_ranks`.

    Raises:
        ValueError: a value out of range, a gradient that is missing, projected, zero or not finite, or a budget that
            the least ranks exceed.

    Example:
        >>> import torch
        >>> model = nn.ModuleDict({"mlp": nn.Linear(32, 64)})
        >>> model["mlp"](torch.randn(8, 32)).square().sum().backward()
        >>> choose_ranks(model, budget=10_000, energy=1.0, multiple=4)
        {'mlp': 8}
    """
    budget, multiple, moments = plain(budget), plain(multiple), plain(moments)
    for name, value, least in (("multiple", multiple, 1), ("moments", moments, 0)):
        if not is_whole(value, least):
            raise ValueError(f"{name} is {value!r}; use a whole number of at least {least}")
    if not (is_number(budget) or budget == math.inf):
        raise ValueError(f"budget is {budget!r}; use a number of bytes, such as 24e9")
    energy = plain(energy)
    if not (is_number(energy) and 0 < energy <= 1):
        raise ValueError(f"energy is {energy!r}; use a share above 0, and at most 1")
    held: dict[str, Tensor] = {}
    sizes = []
    for group in filter(is_projected, param_groups(model, 1, target_modules)):
        for name, weight in zip(group["param_names"], group["params"], strict=True):
            projection = projection_in(group, weight)
            held[name.removesuffix(".weight")] = _held(name, weight, projection)
            sizes.append(bytes_a_rank(projection, moments, weight.element_size()))
    curves = list(held.values())
    most = [min(-(-rank_that_holds(curve, energy) // multiple) * multiple, len(curve)) for curve in curves]
    ranks = ranks_within(budget, curves, sizes, most=most, multiple=multiple)
    return dict(zip(held, ranks, strict=True))


def bytes_a_rank(projection: Projection, moments: int, width: int) -> int:
    """The bytes of optimizer state that each rank of a weight takes.

    Args:
        projection: of the weight at rank 1, on one side.
        moments: numbers of each coordinate.
        width: bytes of a number.
    """
    basis = sum(math.prod(shape) for shape in projection.factor_shapes.values())
    return width * (basis + moments * math.prod(projection.projected_shape))


def _held(name: str, weight: Tensor, projection: Projection) -> Tensor:
    """The share of a weight's gradient that its strongest 1 to k directions hold; of stacked ones, of all together."""
    grad = weight.grad
    if grad is None or isinstance(grad, ProjectedGradient):
        raise ValueError(
            f"grad of {name} is {'None' if grad is None else 'projected'}, and ranks are chosen from full gradients; "
            "call choose_ranks after a backward pass, and before attach"
        )
    if not bool(grad.isfinite().all()) or not bool(grad.any()):
        raise ValueError(
            f"grad of {name} is zero or not finite, and tells no directions; call choose_ranks with another"
        )
    grad = grad.cpu() if grad.device.type == "mps" else grad  # which has no float64
    energies = Spectrum.of(gram(grad.reshape(projection.view_shape))).energies
    of_all = energies.reshape(-1, energies.shape[-1]).sum(0).cpu()
    return of_all.cumsum(0) / of_all.sum()
