"""The choices of `attach` and their rules are declared once, in `galore_torch.modes`."""

import inspect

import pytest
import torch

from galore_torch import GaLoreAdamW, GaLoreMuon, ProjectedGradient, param_groups
from galore_torch.gradients import attach
from galore_torch.integrations.transformers import GaLoreFactory
from galore_torch.modes import DEFAULT_GRADIENTS, DEFAULT_UPDATE, GRAD_BITS, GRADIENTS, UPDATES, check_modes

FREE = [(gradients, update) for gradients in GRADIENTS for update in UPDATES if update == "step"]
IN_BACKWARD = [("full", "backward"), ("fused", "backward")]


@pytest.mark.parametrize("function", [attach, GaLoreFactory.__call__], ids=["attach", "factory"])
def test_the_defaults_are_the_same_everywhere(function):
    declared = inspect.signature(function).parameters
    assert declared["gradients"].default is None  # chosen by the optimizer: see the next test
    assert DEFAULT_GRADIENTS == "fused"
    assert declared["update"].default == DEFAULT_UPDATE == "step"


@pytest.mark.parametrize("through", ["attach", "factory"])
@pytest.mark.parametrize(
    ("recipe", "arguments", "chosen"),
    [
        (GaLoreAdamW, {}, "fused"),
        (GaLoreAdamW, {"residual": "fira"}, "full"),
        (GaLoreMuon, {}, "full"),
        (GaLoreMuon, {"residual": None}, "fused"),
    ],
)
def test_gradients_are_full_by_default_where_a_residual_needs_them(recipe, arguments, chosen, through):
    model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(8, 16)})
    if through == "factory":
        GaLoreFactory()(model, rank=2, lr=0.01, optimizer=recipe, **arguments)
    else:
        of_recipe = arguments if recipe is GaLoreMuon else {}
        attach(model, recipe(param_groups(model, rank=2, **arguments), lr=0.01, **of_recipe))
    model["mlp"](torch.randn(3, 8)).sum().backward()
    assert isinstance(model["mlp"].weight.grad, ProjectedGradient) is (chosen == "fused")


def test_never_formed_gradients_and_a_residual_exclude_each_other():
    model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(8, 16)})
    optimizer = GaLoreMuon(param_groups(model, rank=2), lr=0.01)
    with pytest.raises(ValueError, match=r"residual is 'full'.*residual=None"):
        attach(model, optimizer, "fused")


@pytest.mark.parametrize("mode", [*FREE, *IN_BACKWARD])
def test_these_go_together(mode):
    check_modes(*mode)


@pytest.mark.parametrize("gradients", ["projected", "fused"])
@pytest.mark.parametrize("bits", GRAD_BITS)
def test_what_waits_may_be_stored_in_few_bits_accumulated_and_clipped(gradients, bits):
    check_modes(gradients, "step", grad_bits=bits, gradient_accumulation_steps=4, max_grad_norm=1.0)


@pytest.mark.parametrize(
    ("mode", "given", "words"),
    [
        (("half", "step"), {}, ["gradients is 'half'", "'fused'"]),
        (("full", "never"), {}, ["update is 'never'", "'backward'"]),
        (("projected", "backward"), {}, ["gradients='projected'", "update='backward'"]),
        (("fused", "step"), {"grad_bits": 5}, ["grad_bits is 5", "8 or 4"]),
        (("fused", "step"), {"grad_bits": True}, ["grad_bits is True"]),
        (("fused", "step"), {"grad_bits": 8, "grad_dtype": torch.float32}, ["grad_bits is 8", "grad_dtype is torch.f"]),
        (("full", "step"), {"grad_bits": 8}, ["grad_bits is 8", "gradients='full'"]),
        (("full", "step"), {"grad_dtype": torch.float32}, ["grad_dtype is torch.float32", "gradients='full'"]),
        (("fused", "step"), {"save_inputs": "some"}, ["save_inputs is 'some'", "'full', 'projected' or 'sampled'"]),
        (("full", "step"), {"save_inputs": "sampled"}, ["save_inputs is 'sampled'", "gradients='fused'"]),
        (("projected", "step"), {"save_inputs": "full"}, ["save_inputs is 'full'", "gradients='projected'"]),
        (("fused", "backward"), {"grad_bits": 4}, ["grad_bits is 4", "update='backward'"]),
        (("fused", "backward"), {"gradient_accumulation_steps": 2}, ["gradient_accumulation_steps is 2", "'step'"]),
        (("full", "backward"), {"max_grad_norm": 0.5}, ["max_grad_norm is 0.5", "max_grad_norm=0"]),
    ],
)
def test_these_exclude_each_other(mode, given, words):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the words are checked one by one)
        check_modes(*mode, **given)
    assert [word for word in words if word not in str(raised.value)] == []
