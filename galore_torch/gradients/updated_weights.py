"""Which weights have moved inside a backward pass since the last `step()`, and what that forbids.

With `update="backward"` a gradient acts when it is complete. A second one before `step()`, of another backward or of
another re-entrant segment of the same, would act on a weight that is not the one it was computed for, and a gradient
that is thrown away by `zero_grad()` has acted already. Both are found when the first gradient of a backward arrives,
before anything moves. A backward that ends in an error leaves some weights moved and others not; a warning says so.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from galore_torch.gradients.applied_gradient import AppliedGradient
from galore_torch.gradients.known_weights import current_backward
from galore_torch.messages import warn

_will_compute = torch._C._will_engine_execute_node  # as torch.autograd.graph asks the engine


class UpdatedWeights:
    """The weights that have moved since the last `step()`.

    Args:
        at_end: what is done when a backward pass ends.
    """

    def __init__(self, at_end: Callable[[], None]) -> None:
        self._at_end = at_end
        self._names: dict[weakref.ref[Tensor], str] = {}
        self._unfinished: dict[int, _Pass] = {}

    def expect(self) -> None:
        """To be called before a weight is moved: checks the first time in a backward that none will move twice.

        Raises:
            ValueError: one will; nothing has moved in this backward then.
        """
        backward = current_backward()
        if backward in self._unfinished:
            return
        moved = [(one, name, weight) for one, name in self._names.items() if (weight := one()) is not None]
        twice = {one: name for one, name, weight in moved if _arrives(weight)}
        if twice:
            emptied = not any(isinstance(weight.grad, AppliedGradient) for _, _, weight in moved)
            if not (emptied and twice.keys() <= self._moved_in_part().keys()):
                raise ValueError(
                    f"the gradient of {next(iter(twice.values()))} arrives a second time before step(), and the first "
                    "has moved the weight already (update='backward'); zero_grad() does not undo that, and a weight "
                    "that is used in several re-entrant checkpoints gets a gradient from each. Call step() after every "
                    "backward pass (checkpoint with use_reentrant=False); to accumulate gradients or to throw one away "
                    "use attach(..., update='step')"
                )
            self.close()
        finish = functools.partial(self._finish, backward)
        self._unfinished[backward] = _Pass(weakref.ref(finish))
        torch.autograd.Variable._execution_engine.queue_callback(finish)

    def _finish(self, backward: int) -> None:
        self._at_end()
        self._unfinished.pop(backward, None)

    def add(self, weight: Tensor, name: str) -> None:
        """Notes a weight that has moved.

        Args:
            weight: the weight.
            name: what messages call it.
        """
        key = weakref.ref(weight)
        self._names[key] = name
        for one in self._unfinished.values():
            if one.finish() is not None:
                one.moved.append(key)

    def close(self) -> None:
        """Ends the step: all may move again. Warns if its backward pass ended in an error."""
        names = list(self._moved_in_part().values())
        self._names = {}
        self._unfinished.clear()
        if names:
            warn(
                f"a backward pass ended in an error after it had moved {len(names)} weights ({names[0]} first; "
                "update='backward' applies each gradient at once): they have made a step that the others have not. "
                "To be exact load a checkpoint, or use update='step'"
            )

    def _moved_in_part(self) -> dict[weakref.ref[Tensor], str]:
        """What backward passes that have not ended, and re-entrant ones within them, have moved, with its names."""
        moved = (key for one in self._unfinished.values() for key in one.moved)
        return {key: self._names[key] for key in moved if key() is not None}


@dataclass(slots=True)
class _Pass:
    """A backward pass that has not ended: the engine lets go of what is to be done at its end if an error ends it."""

    finish: weakref.ref[Callable[[], None]]
    moved: list[weakref.ref[Tensor]] = field(default_factory=list)


def _arrives(weight: Tensor) -> bool:
    """Whether the backward pass that is running accumulates a gradient of a weight."""
    if not weight.requires_grad:
        return False
    return _will_compute(torch.autograd.graph.get_gradient_edge(weight).node)
