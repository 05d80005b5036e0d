"""A basis that loses nothing, to compare an optimizer inside GaLore with the same one outside."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from galore_torch.group_keys import KEYS
from galore_torch.projection import decompositions


@pytest.fixture
def identity_basis(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The keys of a projected group whose basis is the identity, at full rank and scale 1."""

    def identity(matrix: Tensor, wanted: decompositions.Wanted) -> dict[str, decompositions.Axes]:
        sizes = {"left": matrix.shape[-2], "right": matrix.shape[-1]}
        stack = matrix.shape[:-2]
        return {
            side: decompositions.Axes(
                torch.eye(sizes[side], rank, dtype=matrix.dtype, device=matrix.device).expand(*stack, sizes[side], rank)
            )
            for side, rank in wanted.ranks.items()
        }

    known: dict[str, Callable[..., dict[str, decompositions.Axes]]] = decompositions.DECOMPOSITIONS
    monkeypatch.setitem(known, "identity", identity)
    key = KEYS["decomposition"]
    monkeypatch.setitem(KEYS, "decomposition", replace(key, choices=(*key.choices, "identity")))
    return {"rank": 10**6, "scale": 1.0, "decomposition": "identity"}
