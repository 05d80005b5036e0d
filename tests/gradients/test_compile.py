"""A compiled model: it is one graph, layers take turns to renew, and nothing is compiled again for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from galore_torch import GaLoreAdamW, ProjectedGradient, param_groups, quantize_weights
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
    compiled = torch.compile(model, backend=backend, fullgraph=True)  # no layer breaks it
    walk(compiled, optimizer, range(2))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        walk(compiled, optimizer, range(2, 20))
        eager = llama()
        other = adamw(eager)
        attach(eager, other, *mode)
        walk(eager, other, range(20))
        assert distance(model, eager) <= BAR
        walk(compiled, optimizer, range(20, steps))
    assert counters["stats"]["unique_graphs"] == graphs > 0


def small(steps: int, *, compiles: bool, casts: bool, in_int8: bool) -> tuple[torch.Tensor, type]:
    """The weights of a small net with biases after some steps, and what its first gradient was in the last of them."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24))
    if in_int8:
        quantize_weights(model, "all-linear", group_size=8)
    optimizer = GaLoreAdamW(param_groups(model, 4, "all-linear", update_proj_gap=3), lr=1e-2)
    attach(model, optimizer)
    called = torch.compile(model, backend="aot_eager", fullgraph=not in_int8) if compiles else model
    kind: type = object
    for step in range(steps):
        x = torch.randn(5, 3, 24, generator=torch.Generator().manual_seed(step))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=casts):
            loss = (called(x) - 1).float().square().mean()
        loss.backward()
        kind = type(model[0].weight.grad)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([weight.detach().flatten() for weight in model.parameters()]), kind


@pytest.mark.of_cpu("what puts tensors on another device is not compiled")
@pytest.mark.parametrize("way", [{}, {"casts": True}, {"in_int8": True}], ids=str)
def test_compiled_layers_train_as_the_others(way):
    given = {"casts": False, "in_int8": False, **way}
    (ours, kind), (theirs, _) = (small(7, compiles=compiles, **given) for compiles in (True, False))
    assert kind is ProjectedGradient
    torch.testing.assert_close(ours, theirs)


class Block(nn.Module):
    """A block of a transformer, for the compiler's purposes."""

    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both layers."""
        y: torch.Tensor = x + self.fall(torch.tanh(self.rise(x)))
        return y


@pytest.mark.of_cpu("what puts tensors on another device is not compiled")
def test_equal_blocks_that_are_compiled_one_by_one_are_compiled_once():
    torch._dynamo.reset()
    counters.clear()
    model = nn.Sequential(*[Block() for _ in range(12)])
    optimizer = GaLoreAdamW(param_groups(model, 4, "all-linear", update_proj_gap=3), lr=1e-2)
    attach(model, optimizer)
    for block in model:
        block.compile(backend="aot_eager", fullgraph=True)
    for _ in range(7):
        x = torch.randn(5, 24, requires_grad=True)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counters["stats"]["unique_graphs"] == 1
