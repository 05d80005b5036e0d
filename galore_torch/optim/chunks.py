"""Which weights are stepped together."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from galore_torch.optim.work import Work

CHUNK_ELEMENTS = 2**23
"""Coordinates that are stepped together: enough to keep a device busy, few enough to bound memory."""


def chunks(work: list[Work]) -> Iterator[list[Work]]:
    """Weights of one rule and device together, up to `CHUNK_ELEMENTS` coordinates; all of a rule if it must be.

    Args:
        work: weights in any order.

    Yields:
        Some of them, each once.
    """
    kinds: dict[tuple[int, torch.device | None], list[Work]] = {}
    for one in work:
        kinds.setdefault((id(one.rule), one.weight.device if one.traits.many_calls else None), []).append(one)
    for alike in kinds.values():
        chunk: list[Work] = []
        elements = 0
        for one in alike:
            if chunk and one.traits.many_calls and elements + one.coordinate_count > CHUNK_ELEMENTS:
                yield chunk
                chunk, elements = [], 0
            chunk.append(one)
            elements += one.coordinate_count
        yield chunk
