"""What cannot be quantized is told before anything has changed, and so is an optimizer that cannot move codes."""

import math
import re
import warnings

import pytest
import torch
from torch import nn

from galore_torch import GaLoreAdamW, attach, dequantize_weights, quantize_weights
from tests.lowbit.test_quantize import Small, codes, groups, quantized
from tests.optim.small import assert_same


def with_nan() -> Small:
    model = Small()
    model.mlp.weight.data[2, 3] = math.nan
    return model


def with_gradient() -> Small:
    model = Small()
    model.mlp.weight.grad = torch.ones(24, 24)
    return model


@pytest.mark.parametrize(
    ("make", "keys", "words"),
    [
        (Small, {"group_size": 33}, "group_size is 33; use an even"),
        (Small, {"group_size": 1.5}, "group_size is 1.5; use an even"),
        (Small, {"seed": "a"}, "seed is 'a'; use a whole number"),
        (Small, {"target_modules": ["atn"]}, r"\['atn'\] match no linear layer. These could be named: attn.o, attn.q"),
        (Small, {"target_modules": "*"}, "no regular expression"),
        (nn.Identity, {}, "no linear layer that could be quantized"),
        (with_nan, {}, "mlp.weight holds numbers that are not finite; repair it, or leave it out"),
        (with_gradient, {}, r"mlp.weight has a gradient, which would be lost; make the step and call zero_grad\(\)"),
        (quantized, {}, "attn.q.weight is kept in INT8 already; leave it out of target_modules, or dequantize"),
    ],
)
def test_what_cannot_be_quantized_is_told_and_nothing_has_changed(make, keys, words):
    model = make()
    before = list(model.parameters())
    with pytest.raises(ValueError, match=words):
        quantize_weights(model, **keys)
    assert all(ours is theirs for ours, theirs in zip(before, model.parameters(), strict=True))


def test_what_is_no_linear_layer_is_reported_once_and_left():
    model = Small()
    with pytest.warns(UserWarning, match=re.escape("not quantized: embed.weight (not of a linear layer)")) as caught:
        assert quantize_weights(model, ["embed", "mlp"]) == ["mlp.weight"]
    assert len(caught) == 1
    assert type(model.embed.weight) is nn.Parameter


def test_a_head_that_is_tied_to_the_embedding_is_reported_and_left():
    model = Small(tied=True)
    with pytest.warns(UserWarning, match=re.escape("head (its weight is tied to a module that is not linear)")):
        names = quantize_weights(model, "all-linear")
    assert names == ["attn.q.weight", "attn.o.weight", "mlp.weight"]
    assert model.head.weight is model.embed.weight


def test_a_head_of_its_own_can_be_quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "head.weight" in quantize_weights(Small(), "all-linear")


def test_an_optimizer_of_the_weights_before_is_refused_and_nothing_moves():
    model = Small()
    optimizer = GaLoreAdamW(groups(model), lr=0.05)
    before_groups = groups(model)
    quantize_weights(model)
    remedy = "replaced by quantize_weights, as attn.q.weight. Make the optimizer after"
    with pytest.raises(ValueError, match="after quantize_weights if that is called"):
        attach(model, optimizer)
    model(torch.arange(3)).sum().backward()
    before = codes(model)
    with pytest.raises(ValueError, match=remedy):
        optimizer.step()
    with pytest.raises(ValueError, match=remedy):
        GaLoreAdamW(before_groups, lr=0.05)
    assert_same(codes(model), before)
    later = GaLoreAdamW(groups(model), lr=0.05)
    dequantize_weights(model)
    with pytest.raises(ValueError, match="replaced by dequantize_weights"):
        later.step()


def test_a_plain_torch_optimizer_is_refused_with_the_remedy():
    model = quantized()
    model(torch.arange(3)).sum().backward()
    with pytest.raises(ValueError, match=r"INT8\. GaLore's optimizers move it"):
        torch.optim.AdamW(model.parameters()).step()
