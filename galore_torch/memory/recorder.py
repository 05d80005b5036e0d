"""`Recorder`: when each piece of memory is allocated and freed while a program runs, and what it is for.

It runs above `FakeTensorMode`, whose tensors have sizes and lifetimes but no numbers, so that the program is the real
one and costs nothing. What a tensor is for is often known later only (a saved activation is one that outlives the
forward, a moment is one that the optimizer holds after a step), so events are kept and judged at the end.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from galore_torch.lowbit import Codes, QuantizedWeight
from galore_torch.optim import ProjectedGradient

KINDS = ("weights", "gradients", "states", "bases", "activations", "logits", "work")
"""What memory is for. Work is what an operation or a step of the optimizer needs for a moment."""

_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)
_PASSING = ("activations", "logits", "work")  # what a kind that is known later takes the place of


def stored_in(tensor: Any) -> list[Tensor]:
    """The plain tensors that a tensor keeps its data in; none for anything else.

    Args:
        tensor: of any kind: a weight or a gradient in few bits counts with its codes and scales, a projected gradient
            without its basis.
    """
    if isinstance(tensor, ProjectedGradient):
        return stored_in(tensor._stored)
    if isinstance(tensor, (Codes, QuantizedWeight)):
        return [part for part in (tensor.codes, tensor.scale, getattr(tensor, "low", None)) if part is not None]
    if hasattr(tensor, "__tensor_flatten__") and not isinstance(tensor, FakeTensor):
        return [part for name in tensor.__tensor_flatten__()[0] for part in stored_in(getattr(tensor, name))]
    return [tensor] if type(tensor) in _PLAIN else []


def stored_bytes(tensors: Iterable[Any]) -> int:
    """The bytes of all distinct storages behind tensors.

    Args:
        tensors: of any kind; what is no tensor counts nothing.
    """
    storages = (part.untyped_storage() for one in tensors for part in stored_in(one))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


@dataclass(eq=False, slots=True)
class _Piece:
    """One piece of memory."""

    nbytes: int
    kind: str
    window: int  # the forward that it was made in, by number; 0 outside of one
    outlives: bool = False  # whether it is there at that forward's end


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records memory while it is entered.

    Args:
        vocabulary: entries of the vocabulary, by which logits are recognized; 0 for none.
        tokens: of one forward.
    """

    def __init__(self, vocabulary: int = 0, tokens: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._vocabulary, self._tokens = vocabulary, tokens
        self._alive: dict[int, tuple[_Piece, Any]] = {}
        self._events: list[tuple[_Piece, int] | str] = []
        self._window = self._windows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what it has allocated. What would read a number gets one as of usual data."""
        if func is torch.ops.prim.device.default and type(args[0]) is FakeTensor:
            return args[0].fake_device
        if any(kind not in _PLAIN for kind in types):
            return NotImplemented  # a tensor of tensors, which comes back with these
        if func is torch.ops.aten._local_scalar_dense.default:
            return _usual(args[0].dtype)
        if func is torch.ops.aten.equal.default:
            return False
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor, self._kind_of(tensor))
        return made

    def _kind_of(self, tensor: Tensor) -> str:
        if (
            self._vocabulary
            and tensor.dim() > 1
            and tensor.shape[-1] == self._vocabulary
            and 2 * tensor.numel() >= self._vocabulary * self._tokens
        ):
            return "logits"
        return "activations" if self._window else "work"

    def _see(self, tensor: Tensor, kind: str) -> _Piece:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            piece = _Piece(storage.nbytes(), kind, self._window)

            def free(_: Any) -> None:
                del self._alive[key]
                self._events.append((piece, -piece.nbytes))

            self._alive[key] = piece, weakref.ref(storage, free)
            self._events.append((piece, piece.nbytes))
        return self._alive[key][0]

    def hold(self, kind: str, tensors: Iterable[Any]) -> None:
        """Say what tensors are for.

        Args:
            kind: one of `KINDS`. Weights, states and bases stay what they are.
            tensors: of any kind.
        """
        for tensor in tensors:
            for part in stored_in(tensor):
                piece = self._see(part, kind)
                if piece.kind in _PASSING or (piece.kind == "gradients" and kind != "weights"):
                    piece.kind = kind

    def phase(self, name: str) -> None:
        """Begin a phase, whose peak is one of `peaks`.

        Args:
            name: of it; one that comes again is one phase.
        """
        self._events.append(name)

    def begin_forward(self) -> None:
        """What is allocated from now on and is there at `end_forward` is an activation."""
        self._windows += 1
        self._window = self._windows

    def end_forward(self) -> None:
        """The forward is over."""
        for piece, _ in self._alive.values():
            piece.outlives = piece.outlives or piece.window == self._window
        self._window = 0

    def peaks(self) -> dict[str, Counter[str]]:
        """By phase, the bytes of each kind at the moment when they are the most; none before the first."""
        now: Counter[str] = Counter()
        total, most, phase = 0, -1, ""
        peaks: dict[str, Counter[str]] = {}
        highest: dict[str, int] = {}
        for event in self._events:
            if isinstance(event, str):
                phase, most = event, highest.get(event, -1)
            else:
                piece, change = event
                passing = piece.kind == "activations" and not piece.outlives
                now["work" if passing else piece.kind] += change
                total += change
            if phase and total > most:
                most = highest[phase] = total
                peaks[phase] = now.copy()
        return peaks


def _usual(dtype: torch.dtype) -> bool | int | float:
    """What a number read from a tensor is, as a rule: masks hide nothing, norms are not zero, nothing is missing."""
    return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 0
