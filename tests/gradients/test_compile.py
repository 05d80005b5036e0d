"""A compiled model: layers take turns to renew, and nothing is compiled again for it."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from galore_torch.gradients import attach
from tests.gradients.llama import BAR, adamw, distance, llama, walk
from tests.modes import MODES

pytestmark = pytest.mark.slow

FUSED = [mode for mode in MODES.values() if mode[0] == "fused"]


@pytest.mark.of_cpu("what puts tensors on another device is not compiled")
@pytest.mark.parametrize(("mode", "backend", "steps"), [(FUSED[0], "aot_eager", 100), (FUSED[1], "eager", 20)], ids=str)
def test_a_compiled_model_trains_without_compiling_again(mode, backend, steps):
    torch._dynamo.reset()
    counters.clear()
    model = llama()
    optimizer = adamw(model)
    attach(model, optimizer, *mode)
    compiled = torch.compile(model, backend=backend)
    walk(compiled, optimizer, range(2))
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        walk(compiled, optimizer, range(2, 20))
        eager = llama()
        other = adamw(eager)
        attach(eager, other, *mode)
        walk(eager, other, range(20))
        assert distance(model, eager) <= BAR
        walk(compiled, optimizer, range(20, steps))
    assert counters["stats"]["unique_graphs"] == graphs > 0
