"""Averages of weights in INT8 do not stand still in silence, and files of such weights need one import."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_avg_fn

from galore_torch import dequantize_weights, quantize_weights
from galore_torch.lowbit import QuantizedWeight

KINDS = {
    "swa": {},
    "swa, by a function": {"avg_fn": get_swa_avg_fn()},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "ema, by a function": {"avg_fn": get_ema_avg_fn(0.999)},
}


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32)).to(dtype)
    quantize_weights(net, "all-linear")
    return net


def drift(net: nn.Module) -> None:
    """One update, of some codes."""
    weight = net[0].weight
    weight.move(lambda rows: torch.ones(rows.stop - rows.start, 32), step=1, alpha=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_average_is_refused_with_the_remedy(kind, dtype):
    net = model(dtype)
    averaged = AveragedModel(net, **kind)
    averaged.update_parameters(net)  # the first only copies
    drift(net)
    before = averaged.module[0].weight.decode()
    with pytest.raises(ValueError, match=r"dequantize_weights\(averaged_model\)"):
        averaged.update_parameters(net)
    assert torch.equal(averaged.module[0].weight.decode(), before)


def test_other_weights_load_by_the_remedy_once_a_weight_has_been_computed_with():
    net, plain = model(), model()
    dequantize_weights(plain)
    plain[0].weight.data.normal_()
    net[0].weight * 1
    with pytest.raises(RuntimeError, match=r"dequantize_weights\(model\), load_state_dict and quantize_weights"):
        net.load_state_dict(plain.state_dict())
    dequantize_weights(net)
    net.load_state_dict(plain.state_dict())
    quantize_weights(net, "all-linear")
    assert (net[0].weight - plain[0].weight).abs().max() <= plain[0].weight.abs().max() / 200


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_remedy_averages_exactly(kind):
    net, plain = model(), model()
    dequantize_weights(plain)
    averaged, expected = AveragedModel(net, **kind), AveragedModel(plain, **kind)
    dequantize_weights(averaged)
    for _ in range(4):
        averaged.update_parameters(net)
        expected.update_parameters(plain)
        drift(net)
        plain[0].weight.data.copy_(net[0].weight.decode())
    assert isinstance(net[0].weight, QuantizedWeight)
    torch.testing.assert_close(averaged.module[0].weight, expected.module[0].weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "update", [lambda w, v: w.copy_(0.9 * w + 0.1 * v), lambda w, v: w.copy_(torch.lerp(w, v, 0.1))]
)
def test_so_is_one_that_is_written_by_hand(update):
    net = model()
    averaged = copy.deepcopy(net)
    drift(net)
    with torch.no_grad(), pytest.raises(ValueError, match="less than half a code would be lost"):
        update(averaged[0].weight, net[0].weight)


def test_loading_is_not_taken_for_an_average():
    """After arithmetic with the weights: a penalty, say, or a norm that is logged."""
    net = model()
    trained = copy.deepcopy(net)
    drift(trained)
    (net[0].weight - trained[0].weight).square().sum()
    for dtype in (torch.float32, torch.bfloat16):
        net.load_state_dict({name: tensor.contiguous().to(dtype) for name, tensor in trained.state_dict().items()})
        assert torch.equal(net[0].weight.decode(), trained[0].weight.decode())
    plain = torch.randn(32, 32)
    net.load_state_dict({"0.weight": plain, "0.bias": torch.zeros(32)})
    assert (net[0].weight - plain).abs().max() < 0.03
    drift(net)  # a step has been made since the weights were read
    net.load_state_dict({"0.weight": plain, "0.bias": torch.zeros(32)})


@pytest.mark.slow
@pytest.mark.parametrize("order", ["import torch, galore_torch", "import galore_torch, torch"])
def test_a_file_of_such_weights_needs_one_import(order, tmp_path):
    net = model()
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    code = f"{order}; print(type(torch.load({str(tmp_path / 'weights.pt')!r})['0.weight']).__name__)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.stdout.strip() == "QuantizedWeight", child.stderr
