"""A weight in INT8 as a tensor: what it stores, how it moves, what torch may do with it."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from galore_torch.lowbit import QuantizedWeight, weights

DTYPES = [torch.float32, torch.bfloat16]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same_codes(one: Tensor, other: Tensor) -> None:
    assert isinstance(one, QuantizedWeight)
    assert isinstance(other, QuantizedWeight)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale, other.scale)


@pytest.fixture(params=[weights.BLOCK_ELEMENTS, 100], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """Whether a small weight is one block or many."""
    monkeypatch.setattr(weights, "BLOCK_ELEMENTS", request.param)


# What is stored -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("shape", [(40, 24), (7, 13), (1, 5), (33, 1), (3, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_is_off_by_no_more_than_half_a_code(shape, dtype):
    """Also where no group divides the weight."""
    weight = numbers(*shape).to(dtype)
    kept = QuantizedWeight.of(weight, group_size=16)
    assert (kept.shape, kept.dtype) == (weight.shape, dtype)
    groups = -(-weight.numel() // 16)
    assert (kept.codes.numel(), kept.scale.numel()) == (16 * groups, groups)
    code = (kept.scale.float() / 127).repeat_interleave(16)[: weight.numel()].view(shape)
    assert ((kept.decode(torch.float32) - weight.float()).abs() <= (0.51 + 127 * 2**-8) * code).all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31), st.floats(1e-5, 1e3), st.sampled_from([2, 16, 256]), st.sampled_from(DTYPES), st.booleans()
)
def test_written_out_and_taken_in_again_codes_are_the_same(seed, size, group_size, dtype, moved):
    """Whatever is written in bfloat16 or more: a plain checkpoint is a lossless form."""
    weight = QuantizedWeight.of((size * numbers(20, 15, seed=seed)).to(dtype), group_size, seed=seed)
    if moved:
        weight.move(lambda rows: (size * numbers(20, 15, seed=seed + 1)).to(dtype)[rows], step=3, alpha=0.01)
    again = QuantizedWeight.of(weight.decode(torch.bfloat16), group_size)
    assert_same_codes(again, weight)


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_a_group_of_one_value_keeps_it_and_can_move(value):
    kept = QuantizedWeight.of(torch.full((4, 32), value), group_size=32, seed=0)
    assert torch.equal(kept.decode(), torch.full((4, 32), value))
    kept.move(lambda rows: numbers(4, 32)[rows], step=1)
    assert (kept.decode() - value - numbers(4, 32)).abs().max() < 0.05  # two of 256 codes over a range of 6


def test_a_byte_a_number_and_two_a_group():
    kept = QuantizedWeight.of(numbers(64, 64), group_size=256)
    assert kept.stored_bytes == 64 * 64 * (1 + 2 / 256)
    assert kept.untyped_storage().nbytes() == 64 * 64


@pytest.mark.parametrize(
    ("weight", "group_size", "words"),
    [
        (torch.ones(4, 4), 3, "group_size is 3; use an even"),
        (torch.ones(4, 4), 0, "group_size is 0"),
        (torch.ones(4), 2, r"shape \(4,\).* two dimensions"),
        (torch.ones(4, 4, dtype=torch.int32), 2, r"torch.int32 cannot be kept in INT8"),
        (torch.full((4, 4), math.inf), 2, "not finite; repair it"),
        (torch.full((4, 4), math.nan), 2, "not finite; repair it"),
    ],
)
def test_what_cannot_be_kept_is_told(weight, group_size, words):
    with pytest.raises(ValueError, match=words):
        QuantizedWeight.of(weight, group_size)


# Updates --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("columns", [24, 7])
def test_an_update_is_added_to_what_is_decoded_and_rounded_to_the_nearest(columns):
    kept, update = QuantizedWeight.of(numbers(30, columns), 16), numbers(30, columns, seed=1)
    expected = QuantizedWeight.of(0.9 * kept.decode() + 0.1 * update, 16)
    codes = kept.codes
    kept.move(lambda rows: update[rows], step=1, alpha=0.1, beta=0.9)
    assert_same_codes(kept, expected)
    assert kept.codes is codes


def test_rounded_at_random_an_update_is_right_on_average_and_else_it_is_lost():
    # 400 equal groups, so that one update shows an average. A code is a hundredth wide.
    group = torch.cat((torch.tensor([1.27]), numbers(1, 31)[0].clamp(-1, 1)))
    start, update = group.repeat(400, 1), 1e-3 * numbers(1, 32, seed=1).repeat(400, 1)
    update[:, 0] = 0
    drifts = {}
    for seed in (0, None):
        kept = QuantizedWeight.of(start, 32, seed=seed)
        before = kept.decode()
        kept.move(lambda rows: update[rows], step=1)
        drifts[seed] = (kept.decode() - before).mean(0)
    error = (update[0].abs() * 0.01 / 400).sqrt()
    assert ((drifts[0] - update[0]).abs() <= 5 * error + 1e-6).all()
    assert (drifts[0] != 0).sum() > 25
    assert (drifts[None] == 0).all()


def test_random_numbers_depend_on_seed_and_step_alone():
    def moved(seed, step):
        kept = QuantizedWeight.of(numbers(16, 32), 32, seed=seed)
        torch.rand(seed + step)  # the global state has no part in it
        kept.move(lambda rows: 0.01 * numbers(16, 32, seed=1)[rows], step=step)
        return kept

    assert_same_codes(moved(3, 4), moved(3, 4))
    assert not torch.equal(moved(3, 4).codes, moved(3, 5).codes)
    assert not torch.equal(moved(3, 4).codes, moved(4, 4).codes)


def test_what_is_not_finite_shows_in_the_weight():
    kept = QuantizedWeight.of(numbers(4, 32), 32)
    kept.move(lambda rows: torch.full((4, 32), math.nan)[rows], step=1)
    assert kept.decode().isnan().all()


# A linear layer -------------------------------------------------------------------------------------------------------


def layers(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """A layer in INT8, and a plain one of the same numbers."""
    quantized = nn.Linear(24, 40, bias=bias).to(dtype)
    quantized.weight = nn.Parameter(QuantizedWeight.of(quantized.weight, 32))
    plain = copy.deepcopy(quantized)
    plain.weight = nn.Parameter(quantized.weight.decode())
    return quantized, plain


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(6,), (2, 3), ()])
def test_a_layer_computes_as_a_plain_one(dtype, bias, leading):
    results = []
    for layer in layers(dtype, bias):
        x = numbers(*leading, 24).to(dtype).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(weight.grad for weight in layer.parameters())])
        assert type(layer.weight.grad) is Tensor
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_reaches_the_layer(device):
    results = []
    for layer in layers():
        with torch.autocast(device, torch.bfloat16):
            y = layer(numbers(5, 24))
        y.float().square().sum().backward()
        results.append([y, layer.weight.grad, layer.bias.grad])
    assert results[0][0].dtype == torch.bfloat16
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_what_needs_a_gradient_gets_one():
    quantized, _ = layers()
    quantized.weight.requires_grad_(False)
    x = numbers(5, 24).requires_grad_()
    quantized(x).sum().backward()
    assert quantized.weight.grad is None
    assert x.grad is not None
    quantized.weight.requires_grad_(True)
    quantized(numbers(5, 24)).sum().backward()
    assert quantized.weight.grad is not None


def test_a_weight_that_has_moved_since_the_forward_stops_the_backward():
    quantized, _ = layers()
    y = quantized(numbers(5, 24))
    quantized.weight.move(lambda rows: numbers(40, 24)[rows], step=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# What torch may do with it --------------------------------------------------------------------------------------------


def test_reading_sees_the_numbers_and_gradients_flow():
    parameter = nn.Parameter(QuantizedWeight.of(numbers(6, 4), 8))
    plain = parameter.decode()
    assert torch.equal(parameter.T @ numbers(6, 3), plain.T @ numbers(6, 3))
    assert torch.equal(parameter.detach().reshape(-1)[3:5], plain.reshape(-1)[3:5])
    assert torch.equal(F.linear(parameter.detach(), numbers(5, 4)), plain @ numbers(5, 4).T)
    assert parameter.tolist() == plain.tolist()
    assert (parameter.detach().cpu().numpy() == plain.cpu().numpy()).all()
    target = torch.zeros(6, 4)
    target[:2] = parameter.detach()[:2]
    target[2:] = torch.Tensor(parameter.detach()[2:])
    assert torch.equal(target, plain)
    (parameter.contiguous() * parameter).sum().backward()
    torch.testing.assert_close(parameter.grad, 2 * plain)
    assert "QuantizedWeight" in repr(parameter)


def test_what_takes_its_shape_takes_none_of_its_numbers(monkeypatch):
    kept = QuantizedWeight.of(numbers(6, 4).bfloat16(), 8)
    monkeypatch.setattr(QuantizedWeight, "decode", lambda *_: pytest.fail("it was decoded"))
    for made in (torch.zeros_like(kept), torch.empty_like(kept), kept.new_zeros(6, 4), torch.ones_like(kept)):
        assert (type(made), made.dtype, made.shape, made.stride()) == (Tensor, torch.bfloat16, (6, 4), (4, 1))
    assert torch.zeros_like(kept, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("how", ["deepcopy", "clone", "save", "whole module"])
def test_copies_are_whole_and_their_own(how):
    layer, _ = layers()
    layer.weight = nn.Parameter(QuantizedWeight.of(layer.weight, 32, seed=7))
    match how:
        case "deepcopy":
            copied = copy.deepcopy(layer).weight
        case "clone":
            copied = layer.weight.detach().clone()
        case "save":
            copied = reloaded(layer.state_dict(), weights_only=True)["weight"]
        case "whole module":
            copied = reloaded(layer, weights_only=False).weight
    assert_same_codes(copied, layer.weight)
    assert copied.seed == 7
    is_module = how in ("deepcopy", "whole module")
    assert isinstance(copied, nn.Parameter) == is_module
    assert copied.requires_grad == is_module
    copied.move(lambda rows: torch.ones(40, 24)[rows], step=1)
    assert not torch.equal(copied.codes, layer.weight.codes)


def reloaded(thing, *, weights_only: bool):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def test_moving_a_module_keeps_its_parameter_and_its_hooks(device):
    layer, _ = layers()
    parameter, seen = layer.weight, []
    parameter.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.dtype))
    layer.to(device).bfloat16()
    assert layer.weight is parameter
    assert (parameter.dtype, parameter.decode().dtype) == (torch.bfloat16, torch.bfloat16)
    layer(numbers(2, 24).bfloat16()).sum().backward()
    assert seen == [torch.bfloat16]
    layer.to("meta")
    assert {layer.weight.device.type, layer.weight.codes.device.type} == {"meta"}


def test_dtypes_that_codes_can_stand_for():
    kept = QuantizedWeight.of(numbers(6, 4), 8)
    assert isinstance(kept.double(), QuantizedWeight)
    assert kept.double().decode().dtype == torch.float64
    assert type(kept.to(torch.int32)) is Tensor


def test_copy_takes_plain_numbers_and_codes_of_any_groups():
    kept = QuantizedWeight.of(numbers(6, 4), 8)
    other = numbers(6, 4, seed=1)
    kept.copy_(other)
    assert_same_codes(kept, QuantizedWeight.of(other, 8))
    kept.copy_(QuantizedWeight.of(numbers(6, 4), 4))
    assert_same_codes(kept, QuantizedWeight.of(QuantizedWeight.of(numbers(6, 4), 4).decode(), 8))
    plain = torch.zeros(6, 4).copy_(kept)
    assert torch.equal(plain, kept.decode())
    with pytest.raises(ValueError, match="not finite"):
        kept.copy_(torch.full((6, 4), math.inf))
    assert torch.equal(plain, kept.decode())


IN_PLACE = {
    "add": lambda weight: weight.data.add_(1),
    "init": nn.init.normal_,
    "an optimizer": lambda weight: stepped(torch.optim.SGD([weight], lr=0.1, foreach=True), weight),
    "a fused optimizer": lambda weight: stepped(torch.optim.AdamW([weight], lr=0.1, fused=True), weight),
    "an item": lambda weight: weight.data.__setitem__(0, 1.0),
    "data": lambda weight: setattr(weight, "data", torch.ones(6, 4)),
    "memory": lambda weight: weight.data_ptr(),
    "out": lambda weight: torch.add(torch.ones(6, 4), 1, out=weight.data),
}


def stepped(optimizer: torch.optim.Optimizer, weight: Tensor) -> None:
    weight.grad = torch.ones(6, 4)
    optimizer.step()


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_what_would_change_it_in_place_is_refused(change):
    weight = nn.Parameter(QuantizedWeight.of(numbers(6, 4), 8))
    before = weight.codes.clone()
    with pytest.raises(ValueError, match="INT8"):
        change(weight)
    assert torch.equal(weight.codes, before)
