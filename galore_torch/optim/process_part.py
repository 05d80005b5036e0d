"""`ProcessPart`: what of a weight is in this process. Here all of it; `distributed/` has weights that are in parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from galore_torch.optim.processes import local_part
from galore_torch.optim.state_keys import COMPENSATION
from galore_torch.projection import Basis, Projection


class ProcessPart:
    """What of a weight is in this process, and how the rule gets it."""

    __slots__ = ()

    if TYPE_CHECKING:
        weight: Tensor
        state: dict[str, Any]
        local_projection: Projection

        @property
        def factors(self) -> Basis: ...  # noqa: D102

    @property
    def local(self) -> Tensor:
        """What of the weight is in this process: all of it, unless it is sharded."""
        return local_part(self.weight)

    @property
    def local_compensation(self) -> Tensor:
        """What rounding has cut off so far, of `local`'s shape."""
        return local_part(self.state[COMPENSATION])

    def lent(self) -> Tensor:
        """The weight as the rule moves it, in place or a copy."""
        return self.local

    def given_back(self, moved: Tensor) -> Tensor:
        """What is in this process of a tensor that the rule has moved: of coordinates, or of what was lent.

        Args:
            moved: the tensor.
        """
        return moved

    def held_basis(self, stored: dict[str, Any]) -> dict[str, Any]:
        """What of a basis is in this process: all of it.

        Args:
            stored: what is kept of its factors by mode.
        """
        return stored

    def project(self, tensor: Tensor) -> Tensor:
        """The projection of a tensor of the weight's shape.

        Args:
            tensor: of which this process may have a part, as of the weight.
        """
        return self.local_projection.project(tensor, self.factors)

    def of_stack(self, matrices: Tensor) -> Tensor:
        """Those that belong to what is in this process, where a stack of weights has one each; else the tensor itself.

        Args:
            matrices: for all of the weight.
        """
        return matrices

    def opened(self, inner: Any) -> Any:
        """The rule's state as the rule takes it: of what is in this process.

        Args:
            inner: as the optimizer holds it.
        """
        return inner

    def closed(self, inner: Any) -> Any:
        """The rule's state as the optimizer holds it.

        Args:
            inner: as the rule leaves it.
        """
        return inner
