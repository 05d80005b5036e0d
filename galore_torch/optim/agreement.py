"""What all processes of a job must agree on."""

from __future__ import annotations

import contextlib
import itertools

import torch.distributed as dist

_NUMBERS = itertools.count()


def is_one_of_several() -> bool:
    """Whether this process shares the work with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Agreement:
    """That an optimizer has the same seed in every process, asked once: their bases are to be the same."""

    def __init__(self) -> None:
        self._number = next(_NUMBERS)  # which of its process' optimizers this is: the same in all of them
        self._is_reached = False

    def require(self, seed: int) -> None:
        """Checks it without waiting: the first process puts its seed into the job's store, the others compare.

        Args:
            seed: of this process' optimizer.

        Raises:
            ValueError: another process has another seed.
        """
        if self._is_reached or not is_one_of_several():
            return
        store, first = dist.distributed_c10d._get_default_store(), str(seed)
        with contextlib.suppress(RuntimeError, NotImplementedError):  # a kind of store that cannot
            first = store.compare_set(f"galore_torch/seed/{self._number}", "", first).decode()
        if first != str(seed):
            raise ValueError(
                f"seed is {seed} in the process of rank {dist.get_rank()}, and {first} in another: their bases would "
                "differ, and so would their weights. Give all processes the same seed, not their rank"
            )
        self._is_reached = True
