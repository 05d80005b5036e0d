"""Small weights, the gradients they meet, and the steps an optimizer makes with them: what these tests share."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from galore_torch import GaLore

MATRICES = ((24, 16), (16, 24))
PLAIN = ((16, 8), (16,))
RANK = 4


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Parameters of these shapes: the same numbers at every call."""
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradient(weight: Tensor, step: int, index: int) -> Tensor:
    """The gradient that the index-th weight meets in a step: the same at every call."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    return torch.randn(weight.shape, generator=generator).to(weight.dtype)


def walk(optimizer: Optimizer, trained: Sequence[Tensor], steps: Iterable[int]) -> None:
    """Makes the steps of these numbers, each with the gradients that belong to it."""
    for step in steps:
        for index, weight in enumerate(trained):
            weight.grad = gradient(weight, step, index)
        optimizer.step()
    for weight in trained:
        weight.grad = None


def state_of(optimizer: GaLore, weight: Tensor) -> dict[str, Any]:
    """A weight's state, once its device has told what has become of the last renewal."""
    optimizer._outcomes.settle_all()
    state: dict[str, Any] = optimizer.state[weight]
    return state


def groups(trained: Sequence[Tensor], projected: int | None = None, **keys: Any) -> list[dict[str, Any]]:
    """A projected group of the first weights (all that are matrices when None) and a plain one of the others."""
    count = sum(weight.dim() > 1 for weight in trained) if projected is None else projected
    made: list[dict[str, Any]] = [{"params": list(trained[:count]), "rank": RANK, **keys}]
    if trained[count:]:
        made.append({"params": list(trained[count:])})
    return made


def mixed(dtype: torch.dtype = torch.float32, **keys: Any) -> tuple[list[torch.nn.Parameter], list[dict[str, Any]]]:
    """Two projected matrices, a plain one and a vector, and their groups."""
    trained = weights(*MATRICES, *PLAIN, dtype=dtype)
    return trained, groups(trained, len(MATRICES), **{"update_proj_gap": 3, **keys})


def snapshot(optimizer: Optimizer) -> tuple[list[Tensor], Any, list[dict[str, Any]]]:
    """Copies of the weights, of the state in their order, and of the groups' values: to compare before and after."""
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    if isinstance(optimizer, GaLore):
        optimizer._outcomes.settle_all()
    state = [copied(optimizer.state.get(weight, {})) for weight in trained]
    values = [
        {key: copied(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    return [weight.detach().clone() for weight in trained], state, values


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit, dtypes and keys and all."""
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in a tree of dicts and lists."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest relative L2 distance of two lists of weights."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))


def refusing(action: Callable[[], object]) -> str:
    """The message of the ValueError that an action raises."""
    try:
        action()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def copied(tree: Any) -> Any:
    """A tree of dicts, lists and tensors once more: `copy.deepcopy` takes ten times as long for its tensors."""
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [copied(value) for value in tree]
    return tree.clone() if isinstance(tree, Tensor) else tree
