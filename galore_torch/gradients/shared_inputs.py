"""Which layers share an input: what they save of it is less only if all of them let go of the whole.

A layer that needs X Q, or some tokens, saves memory where nothing else keeps X for its own backward: no layer that
shares it (q, k, v; gate, up), no attention whose output it is. And they are to save no more than X together.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from galore_torch.gradients.known_weights import KnownWeights
from galore_torch.optim.galore import GaLore

if TYPE_CHECKING:
    from galore_torch.gradients.linear import FusedLinear


class SharedInput:
    """The layers that were last given one and the same input, one after the other.

    Args:
        is_kept: whether the input is kept whatever these layers save.

    Attributes:
        layers: in the order of their calls.
    """

    def __init__(self, is_kept: bool = False) -> None:
        self.layers: list[FusedLinear] = []
        self._is_kept = is_kept
        self._decided: tuple[int, bool] = (-1, False)

    def saves_parts(self, version: int) -> bool:
        """Whether saving every layer's part of X takes no more than X once. One that needs all of X decides for all.

        Args:
            version: of what is known of weights; as long as it is the same all layers get the same answer.
        """
        if self._decided[0] != version:
            widths = [layer.width(version) for layer in self.layers]
            fits = bool(widths) and 0 not in widths and sum(widths) <= self.layers[0].module.in_features
            self._decided = version, fits and not self._is_kept
        return self._decided[1]


class InputTracker:
    """Finds out which layers share an input, by the order of their calls.

    Args:
        optimizer: holds their weights.

    Attributes:
        known: what hooks know of the weights.
        first: the layer that was called first since all weights were looked at, and looks at them again when it is
            called again: once in each pass over the model.
        version: of what was known of them then.
        layers: all that there are.
    """

    def __init__(self, optimizer: GaLore) -> None:
        self.known = KnownWeights(optimizer)
        self._last_input: Callable[[], Tensor | None] = lambda: None
        self._current = SharedInput()
        self.first: FusedLinear | None = None
        self.version = -1
        self.layers: list[FusedLinear] = []

    def begin_pass(self, layer: FusedLinear) -> None:
        """Looks for what a user may have changed, in all weights, and if anything has lets all layers plan.

        One after the other they take half as long for that as between the operations of a forward.

        Args:
            layer: the first one of the pass.
        """
        layer.optimizer._checked_weights()
        self.first, version = layer, layer.optimizer._cache.version
        if self.version != version:
            self.version = version
            for one in self.layers:
                one.plan_again()

    def record_call(self, layer: FusedLinear, x: Tensor) -> None:
        """Notes a call. What is learned holds from the next step on, when all that share the input are known."""
        if self._last_input() is not x or layer in self._current.layers:
            self._last_input, self._current = weakref.ref(x), SharedInput(_is_kept(x))
        self._current.layers.append(layer)
        layer.shared = self._current


def _is_kept(x: Tensor) -> bool:
    """Whether x is a view of what scaled_dot_product_attention has returned, which that keeps for its backward."""
    base = x._base
    return base is not None and base.grad_fn is not None and "ScaledDotProduct" in base.grad_fn.name()
