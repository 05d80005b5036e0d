"""Views of a weight in INT8: they read what it stands for, and what is written to them is not lost in silence."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from galore_torch.lowbit import QuantizedWeight
from tests.optim.small import refusing

WRITES: dict[str, Callable[[Tensor], object]] = {
    "a row set to zero": lambda weight: weight[0].zero_(),
    "an entry of a row": lambda weight: weight[0].__setitem__(1, 3.0),
    "the transposed weight": lambda weight: weight.t().mul_(2),
    "of its data": lambda weight: weight.data.view(-1)[:3].fill_(7.0),
    "a row in a sum": lambda weight: weight[0].__iadd__(1),
    "one of its rows": lambda weight: weight.unbind(0)[0].copy_(weight[1]),
    "the result of an operation": lambda weight: torch.add(weight[0], 1, out=weight[0]),
    "several at once": lambda weight: torch._foreach_add_([weight[0], weight[1]], 1.0),
    "a part initialized anew": lambda weight: nn.init.normal_(weight[:4]),
}


def quantized() -> nn.Parameter:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(QuantizedWeight.of(weight, group_size=32))


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_is_written_to_a_view_is_refused(write: Callable[[Tensor], object]):
    weight = quantized()
    with torch.no_grad():
        assert "INT8" in refusing(lambda: write(weight))


def test_a_view_is_read_as_a_plain_tensor():
    weight = quantized()
    plain = weight.decode()
    with torch.no_grad():
        assert torch.equal(weight[2:4] + 0, plain[2:4])
        assert torch.equal(torch.ones(3, 16) @ weight.t(), torch.ones(3, 16) @ plain.t())
        assert weight.view(-1).shape == torch.Size([128])
        assert weight[0].tolist() == plain[0].tolist()
        assert type(weight[0].clone().zero_()) is Tensor


def test_gradients_flow_through_a_view():
    weight = quantized()
    plain = weight.decode().requires_grad_()
    for one in (weight, plain):
        (torch.ones(3, 16) @ one[:4].t()).square().sum().backward()
    assert torch.equal(weight.grad, plain.grad)


def test_what_is_copied_or_saved_of_it_is_plain():
    part = quantized().detach()[:2]
    file = io.BytesIO()
    torch.save(part, file)
    file.seek(0)
    for made in (copy.deepcopy(part), torch.load(file, weights_only=True)):
        assert type(made) is Tensor
        assert torch.equal(made, part)


def test_a_parameter_made_of_it_can_be_trained_and_copied():
    module = nn.Module()
    module.part = nn.Parameter(quantized()[:2])
    before = module.part.detach().clone()
    module.part.sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.5).step()
    assert torch.equal(module.part, before - 0.5)
    assert type(copy.deepcopy(module).part) is nn.Parameter
