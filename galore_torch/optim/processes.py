"""What a step asks the other processes of its job, and where `distributed/`, of which nothing here knows, answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from galore_torch.optim.agreement import Agreement

if TYPE_CHECKING:
    from galore_torch.optim.trained_weight import TrainedWeight

JOIN: list[Callable[..., Any]] = []
"""`attach` asks it for a model's traffic (`gradients/data_parallel.py`), by its optimizer, the weights (by name) that
are projected before `step()`, the dtype of their projected gradients, and whether they are applied in the backward.
None without a process group."""

SHARD: list[Callable[..., Any]] = []
"""The optimizer asks it for the work on a DTensor, by the work on it as if it were whole."""


class Alone:
    """What a step asks the other processes; there are none, or they are left to themselves.

    Attributes:
        whole_weights: of weights as layers see them, which have been put together for the time of a layer, those that
            the optimizer holds.
    """

    def __init__(self) -> None:
        self._agreement = Agreement()
        self.whole_weights: Any = WeakTensorKeyDictionary()

    def held(self, weight: Tensor) -> Tensor:
        """The weight that the optimizer holds, of one as a layer sees it.

        Args:
            weight: the same one, but where layers have put it together.
        """
        return self.whole_weights.get(weight, weight) if self.whole_weights else weight

    def require(self, seed: int) -> None:
        """Checks, before the first step, that all processes were given the same.

        Args:
            seed: of this process' optimizer.

        Raises:
            ValueError: they were not.
        """
        self._agreement.require(seed)

    def agree(self, found: Tensor) -> Tensor:
        """The largest value that a process has found.

        Args:
            found: numbers or flags of each weight; of all processes the same ones.
        """
        return found

    def renew(self, trained: Sequence[TrainedWeight]) -> None:
        """Renews the bases of weights whose gradients are finite and not zero.

        Args:
            trained: the weights, of all processes the same ones.
        """
        for one in trained:
            one.renew()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor. Asked without importing what defines it."""
    return hasattr(tensor, "placements")


def local_part(tensor: Tensor) -> Tensor:
    """What of a tensor is in this process: all of it, unless it is a DTensor."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(found: Any) -> Any:
    """All of a tensor of which this process may have a part; what is no DTensor as it is.

    Args:
        found: a tensor, or a number.
    """
    return found.full_tensor() if is_sharded(found) else found
