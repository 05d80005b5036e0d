"""What operations on tensors without numbers return, found out once for all that are given tensors of the same form.

`FakeTensorMode` takes some 0.15 ms to find out what an operation returns, also where it has seen the like; a training
makes the same few hundred operations thousands of times. What the first of them has returned is kept by the form of all
that it was given, and the tensors that the next ones return are made after it, in a quarter of the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_UNPREDICTABLE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)
_CONSTANTS = (type(None), bool, int, float)


@dataclass(frozen=True, slots=True)
class _Form:
    """A tensor that an operation returns: of memory of its own, or of a tensor that it was given."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    of: int | None  # which of the tensors has its memory
    attributes: dict[str, Any]  # that `FakeTensor` keeps of one

    def made(self, tensors: Sequence[FakeTensor], mode: Any) -> FakeTensor:
        with torch._C._DisableTorchDispatch():
            if self.of is None:
                plain = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
            else:
                storage: Any = tensors[self.of].untyped_storage()
                plain = torch.empty(0, dtype=self.dtype, device="meta")
                plain.set_(storage, self.offset, self.shape, self.stride)
        # What FakeTensor's constructor does takes as long again as all else.
        found = Tensor._make_subclass(
            FakeTensor, plain, False, dispatch_device=True, device_for_backend_keys=self.device
        )
        found.__dict__.update(self.attributes, fake_mode=mode)
        return found


@dataclass(frozen=True, slots=True)
class _Given:
    """The place of a tensor that an operation was given and returns itself."""

    place: int


_KNOWN: dict[Any, tuple[type, list[Any]] | None] = {}
"""By an operation and what it was given, what it returns; None where that is to be asked each time."""


def run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What an operation returns, below `FakeTensorMode`.

    Args:
        func: of torch's dispatcher.
        args: tensors without numbers, lists of them, and values.
        kwargs: of the same.
    """
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    parts: list[Any] = [func, torch.get_default_dtype()]
    tensors: list[FakeTensor] = []
    if mode is None or not (_describe(args, parts, tensors) and _describe(kwargs.items(), parts, tensors)):
        return func(*args, **kwargs)
    key = tuple(parts)
    if key not in _KNOWN:
        made = func(*args, **kwargs)
        _KNOWN[key] = _learn(func, made, tensors)
        return made
    known = _KNOWN[key]
    if known is None:
        return func(*args, **kwargs)
    kind, returned = known
    results = [
        one.made(tensors, mode) if type(one) is _Form else tensors[one.place] if type(one) is _Given else one
        for one in returned
    ]
    return results[0] if kind is Tensor else kind(results)


def _describe(given: Iterable[Any], parts: list[Any], tensors: list[FakeTensor]) -> bool:
    """Add what tells arguments from others to `parts`, and tensors to `tensors`; False where nothing does."""
    for one in given:
        kind = type(one)
        if kind is FakeTensor:
            if one.constant is not None:
                return False
            tensors.append(one)
            parts += (one.shape, one.stride(), one.storage_offset(), one.dtype, one.fake_device)
        elif kind in (list, tuple):
            parts += (kind, len(one))
            if not _describe(one, parts, tensors):
                return False
        elif isinstance(one, Tensor) or kind.__hash__ is None:
            return False
        else:
            parts += (kind, one)
    return True


def _learn(func: Any, made: Any, tensors: Sequence[FakeTensor]) -> tuple[type, list[Any]] | None:
    if not torch._library.utils.is_builtin(func) or any(tag in func.tags for tag in _UNPREDICTABLE):
        return None
    storages = {one.untyped_storage()._cdata: place for place, one in enumerate(tensors)}
    kind = type(made) if type(made) in (tuple, list) else Tensor
    returned: list[Any] = []
    own: set[int] = set()
    for one in made if kind is not Tensor else [made]:
        place = next((place for place, given in enumerate(tensors) if given is one), None)
        if place is not None:
            returned.append(_Given(place))
        elif type(one) is FakeTensor and one.constant is None:
            storage = one.untyped_storage()
            of = storages.get(storage._cdata)
            kept = {name: value for name, value in vars(one).items() if name != "fake_mode"}
            form = _Form(one.shape, one.stride(), int(one.storage_offset()), one.dtype, one.fake_device, of, kept)
            if form.of is None:  # memory of its own, and as much as its form says
                again = torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device="meta")
                if form.offset or storage._cdata in own or storage.nbytes() != again.untyped_storage().nbytes():
                    return None
                own.add(storage._cdata)
            returned.append(form)
        elif type(one) in _CONSTANTS:
            returned.append(one)
        else:
            return None
    return kind, returned
