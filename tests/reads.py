"""Notice where a number is read from a tensor: the host waits for the device then."""

import sys
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from galore_torch.optim.outcomes import Reading

NAMES = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__contains__")
CALLS = {getattr(Tensor, name) for name in NAMES} | {torch.equal, Tensor.equal, torch.is_nonzero, torch.nonzero}
ARRIVED = Reading.read.__code__
"""Reads what was sent to the host before."""
aten = torch.ops.aten
OPERATIONS = {
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default),
    *(aten._linalg_eigh.default, aten._linalg_svd.default, aten.linalg_cholesky.default, aten.masked_select.default),
}
"""What waits for a device by itself. The decompositions look whether they have converged."""


class Reads:
    """Counts reads; but for numbers that were sent to the host before, which have arrived."""

    def __init__(self) -> None:
        self.where: list[str] = []
        self._modes = (_Calls(self.where), _Operations(self.where))

    @property
    def count(self) -> int:
        """How many there were."""
        return len(self.where)

    def __enter__(self) -> "Reads":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)


class _Calls(TorchFunctionMode):
    """Where Python reads."""

    def __init__(self, where: list[str]) -> None:
        super().__init__()
        self._where = where

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        caller = sys._getframe(1).f_code
        if func in CALLS and caller is not ARRIVED:
            self._where.append(f"{func.__name__} in {caller.co_name}")
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Where torch itself does, as for a tensor that is passed as a number."""

    def __init__(self, where: list[str]) -> None:
        super().__init__()
        self._where = where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPERATIONS:
            self._where.append(str(func))
        return func(*args, **(kwargs or {}))
