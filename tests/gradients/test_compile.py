"""A compiled model: layers take turns to renew, and nothing is compiled again for it."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from galore_torch.gradients import attach
from tests.gradients.llama import BAR, GAP, MODES, adamw, distance, llama, walk

FUSED = [mode for mode in MODES.values() if mode[0] == "fused"]


@pytest.mark.parametrize("mode", [*FUSED, ("projected", "step")], ids=" ".join)
def test_a_compiled_model_trains_without_compiling_again(mode):
    torch._dynamo.reset()
    model = llama()
    optimizer = adamw(model)
    attach(model, optimizer, *mode)
    compiled = torch.compile(model, backend="aot_eager")
    walk(compiled, optimizer, range(2))
    compiled_frames = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        walk(compiled, optimizer, range(2, 2 * GAP))
    assert counters["stats"]["unique_graphs"] == compiled_frames > 0
    eager = llama()
    other = adamw(eager)
    attach(eager, other, *mode)
    walk(eager, other, range(2 * GAP))
    assert distance(model, eager) <= BAR
