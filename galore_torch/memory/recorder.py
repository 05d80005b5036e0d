"""`Recorder`: when each piece of memory is allocated and freed while a program runs, and what it is for.

It runs above `FakeTensorMode`, whose tensors have sizes and lifetimes but no numbers, so that the program is the real
one and costs nothing. What a tensor is for is often known later only (a saved activation is one that outlives the
forward, a moment is one that the optimizer holds after a step), so events are kept and judged at the end.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from galore_torch.memory import known
from galore_torch.optim.state_size import PLAIN, stored_in

KINDS = ("weights", "gradients", "states", "bases", "activations", "logits", "work")
"""What memory is for. Work is what an operation or a step of the optimizer needs for a moment."""

FIRST_STEP = "first step"
"""The phase in which states are made, of gradients alone."""
FIRST_BLOCK = "first block"
"""The phase of that block's backward, the last in a step. A model of one block has none."""

_PASSING = ("activations", "logits", "work")  # what a kind that is known later takes the place of


@dataclass(eq=False, slots=True)
class _Piece:
    """One piece of memory."""

    nbytes: int
    kind: str
    window: int  # the forward that it was made in, by number; 0 outside of one
    block: int | None  # in whose forward it was made; None if in none
    outlives: bool = False  # whether it is there at that forward's end
    held: dict[tuple[int, int], int | None] = field(
        default_factory=dict
    )  # by place and bytes, the block it is held for

    def of(self, block: int) -> int:
        """How many of its bytes belong to a block."""
        owners = set(self.held.values()) or {self.block}
        if owners == {block}:
            return self.nbytes
        return sum(size for (_, size), owner in self.held.items() if owner == block)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records memory while it is entered.

    Args:
        vocabulary: entries of the vocabulary, by which logits are recognized; 0 for none.
        tokens: of one forward.

    Attributes:
        block: which of the model's repeated blocks is in its forward; None if none is.
    """

    def __init__(self, vocabulary: int = 0, tokens: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._vocabulary, self._tokens = vocabulary, tokens
        self._alive: dict[int, tuple[_Piece, Any]] = {}
        self._events: list[tuple[_Piece, int] | str] = []
        self._window = self._windows = 0
        self.block: int | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it is in eager mode already, and to say so of each operation costs as much as to run it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what it has allocated. What would read a number gets one as of usual data."""
        if func is torch.ops.prim.device.default and type(args[0]) is FakeTensor:
            return args[0].fake_device
        if any(kind not in PLAIN for kind in types):
            return NotImplemented  # a tensor of tensors, which comes back with these
        if func is torch.ops.aten._local_scalar_dense.default:
            return _usual(args[0].dtype)
        if func is torch.ops.aten.equal.default:
            return False
        made = known.run(func, args, kwargs or {})
        for tensor in made if isinstance(made, (list, tuple)) else (made,):
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
            piece = _Piece(storage.nbytes(), kind, self._window, self.block)

            def free(_: Any) -> None:
                del self._alive[key]
                self._events.append((piece, -piece.nbytes))

            self._alive[key] = piece, weakref.ref(storage, free)
            self._events.append((piece, piece.nbytes))
        return self._alive[key][0]

    def hold(self, kind: str, tensors: Iterable[Any], block: int | None = None) -> None:
        """Say what tensors are for.

        Args:
            kind: one of `KINDS`. Weights, states and bases stay what they are.
            tensors: of any kind.
            block: that they belong to; None if to none. What is held for several is of none.
        """
        for part in chain.from_iterable(map(stored_in, tensors)):
            piece = self._see(part, "work")
            if piece.kind in _PASSING or (piece.kind == "gradients" and kind in ("bases", "states")):
                piece.kind = kind
                piece.held.clear()
            where = int(part.storage_offset()) * part.itemsize, part.nbytes
            piece.held[where] = block if where not in piece.held or piece.held[where] == block else None

    def bytes_of(self, tensors: Iterable[Any]) -> dict[int | None, int]:
        """The bytes of all distinct pieces of memory behind tensors, for None, and how many of them are each block's.

        Args:
            tensors: that are held.
        """
        found = {id(one): one for one in (self._see(part, "work") for part in chain(*map(stored_in, tensors)))}.values()
        own: dict[int | None, int] = {block: sum(one.of(block) for one in found) for block in (0, 1)}
        return own | {None: sum(one.nbytes for one in found)}

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

    def peaks(self, further: int = 0) -> dict[str, Counter[str]]:
        """By phase, the bytes of each kind at the moment when they are the most; none before the first.

        Args:
            further: blocks that there would be besides the two that were recorded. Work is of one operation or one
                block at a time; of all else each takes as much as a recorded one that is not at work. That is the first
                one, but for the first step, where it is the one that has less gradients, and for the phase in which the
                first one is at work: there it is what the first has at the end, for the second may renew its bases.
        """
        now: Counter[str] = Counter()
        own = Counter[str](), Counter[str]()  # of the two blocks
        total, most, phase = 0, -1, ""
        peaks: dict[str, tuple[Counter[str], Counter[str]]] = {}
        highest: dict[str, int] = {}
        ends: dict[str, Counter[str]] = {}
        for event in [*self._events, ""]:
            if isinstance(event, str):
                ends[phase] = own[0].copy()
                phase, most = event, highest.get(event, -1)
            else:
                piece, change = event
                passing = piece.kind == "activations" and not piece.outlives
                kind = "work" if passing else piece.kind
                now[kind] += change
                total += change
                for block, counts in enumerate(own) if kind != "work" else ():
                    counts[kind] += piece.of(block) if change > 0 else -piece.of(block)
            like = min(own, key=lambda one: one["gradients"]) if phase == FIRST_STEP else own[0]
            reached = total + (further * like.total() if phase != FIRST_BLOCK else 0)
            if phase and reached > most:
                most = highest[phase] = reached
                peaks[phase] = now.copy(), like.copy()
        return {
            phase: Counter({kind: at[kind] + further * each[kind] for kind in KINDS})
            for phase, (at, like) in peaks.items()
            for each in [ends[phase] if phase == FIRST_BLOCK else like]
        }


def _usual(dtype: torch.dtype) -> bool | int | float:
    """What a number read from a tensor is, as a rule: masks hide nothing, norms are not zero, nothing is missing."""
    return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 0
