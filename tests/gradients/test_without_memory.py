"""What asks a tensor for memory that it has not: torch would end the process, so it reads a copy or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galore_torch import GaLoreAdamW, attach, param_groups, quantize_weights
from tests.optim.small import refusing

READS: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda tensor: torch.from_numpy(tensor.numpy()),
    "numpy.asarray": lambda tensor: torch.from_numpy(np.asarray(tensor)),
    "tolist": lambda tensor: torch.tensor(tensor.tolist()),
    "from_dlpack": torch.from_dlpack,
}


def layer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32))


def after_backward(update: str) -> nn.Sequential:
    model = layer()
    optimizer = GaLoreAdamW(param_groups(model, rank=4, target_modules="all-linear"), lr=0.01)
    attach(model, optimizer, "fused", update)
    model(torch.randn(8, 16)).square().mean().backward()
    model.optimizer = optimizer  # which the hooks hold weakly
    return model


def in_int8() -> nn.Sequential:
    model = layer()
    quantize_weights(model, "all-linear")
    return model


of_cpu = pytest.mark.of_cpu("numpy reads the CPU's memory alone")


@pytest.mark.parametrize(
    "read", [pytest.param(read, id=name, marks=of_cpu if "numpy" in name else ()) for name, read in READS.items()]
)
def test_what_reads_it_gets_the_numbers(read: Callable[[Tensor], Any]):
    for tensor in (in_int8()[0].weight.detach(), after_backward("step")[0].weight.grad):
        torch.testing.assert_close(read(tensor), tensor + torch.zeros(32, 16))


def test_what_writes_to_it_is_refused():
    held = (
        in_int8()[0].weight.detach(),
        after_backward("step")[0].weight.grad,
        after_backward("backward")[0].weight.grad,
    )
    for tensor in held:
        assert "in place" in refusing(lambda tensor=tensor: tensor.apply_(abs))


@pytest.mark.parametrize("update", ["step", "backward"])
def test_gradients_that_wait_are_not_shared_with_other_processes(update: str):
    model = after_backward(update)
    assert "zero_grad" in refusing(model.share_memory)
    model.zero_grad()
    assert model.share_memory()[0].weight.is_shared()


@pytest.mark.of_cpu("a GPU's memory counts as shared from the start")
def test_a_weight_in_int8_is_shared_by_its_codes():
    model = in_int8()
    before = model[0].weight.detach().clone()
    assert not model[0].weight.is_shared()
    weight = model.share_memory()[0].weight
    assert weight.is_shared()
    assert torch.equal(weight, before)
