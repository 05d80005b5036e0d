"""Every mode ends where plain `step()` ends: bit for bit where it computes in the same order, else to rounding."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from galore_torch import (
    GaLore,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreSGD,
    ProjectedGradient,
    QGaLoreAdamW8bit,
)
from galore_torch.gradients import attach
from tests.gradients.llama import (
    BAR,
    GAP,
    STEPS,
    TOKENS,
    VOCABULARY,
    adamw,
    distance,
    groups,
    llama,
    projected_weights,
    trained,
    walk,
)
from tests.modes import MODES, every_mode
from tests.optim.small import assert_same

RECIPES = {
    "GaLoreAdamW": lambda model: GaLoreAdamW(groups(model), lr=1e-2, weight_decay=0.1),
    "GaLoreAdafactor": lambda model: GaLoreAdafactor(groups(model)),
    "GaLoreSGD": lambda model: GaLoreSGD(groups(model), lr=0.3, momentum=0.9, weight_decay=0.1),
}
ROUNDING_RECIPES = {
    "GaLoreAdamW8bit": lambda model: GaLoreAdamW8bit(groups(model), lr=1e-2, min_8bit_size=16),
    "QGaLoreAdamW8bit": lambda model: QGaLoreAdamW8bit(groups(model), lr=1e-2, min_8bit_size=16),
    "GaLore Muon": lambda model: GaLore(
        groups(model), optimizer_class=torch.optim.Muon, fallback_class=torch.optim.AdamW, lr=1e-2, weight_decay=0.1
    ),
}
"""Recipes that round to 8 bits or compute in bf16 inside, and so turn a last bit into a visible step."""
FUSED = [mode for mode in MODES.values() if mode[0] == "fused"]
SAME_ORDER = [("projected", "step"), ("full", "backward")]
ids = " ".join
one_layer = functools.partial(llama, num_hidden_layers=1)


@functools.cache
def plain(recipe: str) -> nn.Module:
    return trained(None, {**RECIPES, **ROUNDING_RECIPES}[recipe], one_layer)


@pytest.mark.parametrize("recipe", [*RECIPES, *ROUNDING_RECIPES])
@pytest.mark.parametrize("mode", SAME_ORDER, ids=ids)
@pytest.mark.broad("projected step-GaLoreAdamW", "full backward-GaLoreAdafactor")
def test_the_same_order_of_operations_gives_the_same_bits(recipe, mode):
    ours = trained(mode, {**RECIPES, **ROUNDING_RECIPES}[recipe], one_layer)
    assert_same(list(ours.parameters()), list(plain(recipe).parameters()))


def test_gradients_as_autograd_makes_them_are_left_alone():
    ours = trained(("full", "step"), make=one_layer)
    assert_same(list(ours.parameters()), list(plain("GaLoreAdamW").parameters()))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mode", FUSED, ids=ids)
@pytest.mark.broad("fused step-GaLoreAdamW", "fused backward-GaLoreAdafactor")
def test_fused_agrees_with_plain_step(recipe, mode):
    ours = trained(mode, RECIPES[recipe], one_layer)
    assert 0 < distance(ours, plain(recipe)) <= BAR


@pytest.mark.parametrize("recipe", ROUNDING_RECIPES)
@pytest.mark.parametrize("mode", FUSED, ids=ids)
@pytest.mark.broad("fused step-GaLoreAdamW8bit")
def test_fused_is_as_close_as_rounding_lets_a_recipe_be(recipe, mode):
    theirs, control = plain_and_disturbed(recipe)
    ours = trained(mode, ROUNDING_RECIPES[recipe], one_layer)
    assert 0 < distance(ours, theirs) <= 3 * distance(control, theirs)


@functools.cache
def plain_and_disturbed(recipe: str) -> tuple[nn.Module, nn.Module]:
    """Models after plain steps, and after plain steps from gradients that differ in their last bits."""
    theirs = trained(None, ROUNDING_RECIPES[recipe], one_layer)
    model = one_layer()
    optimizer = ROUNDING_RECIPES[recipe](model)
    generator = torch.Generator().manual_seed(1)

    def disturb(grad: Tensor) -> Tensor:
        return grad * (1 + 1e-7 * torch.randn(grad.shape, generator=generator).to(grad))

    for weight in projected_weights(optimizer):
        weight.register_hook(disturb)
    walk(model, optimizer)
    return theirs, model


@pytest.mark.parametrize("mode", FUSED, ids=ids)
@pytest.mark.parametrize("keys", [{"attention_bias": True}, {"mlp_bias": True}], ids=str)
@pytest.mark.broad("{'attention_bias': True}-fused step")
def test_layers_with_a_bias(mode, keys):
    """All but the keys' bias: softmax sees nothing of it but through the positions, so its gradient is mostly noise."""
    ours, theirs = (trained(one, make=lambda: one_layer(**keys)) for one in (mode, None))
    for model in (ours, theirs):
        for name, weight in model.named_parameters():
            if name.endswith("k_proj.bias"):
                weight.data.zero_()
    assert distance(ours, theirs) <= BAR


@pytest.mark.parametrize("proj_type", ["left", "right", "full", "reverse_std"])
@pytest.mark.parametrize("gradients", ["projected", "fused"])
@pytest.mark.broad("projected-reverse_std", "fused-right")
def test_every_side(proj_type, gradients):
    def build(model: nn.Module) -> GaLore:
        return adamw(model, proj_type=proj_type)

    ours, theirs = (trained(mode, build, one_layer) for mode in ((gradients, "step"), None))
    if gradients == "projected":
        assert_same(list(ours.parameters()), list(theirs.parameters()))
    assert distance(ours, theirs) <= BAR


@every_mode
@pytest.mark.broad("fused, at step", "full, in backward")
def test_renewals_fall_on_the_same_steps(mode):
    counts = []
    for one in (mode, None):
        model = llama()
        optimizer = adamw(model)
        if one is not None:
            attach(model, optimizer, *one)
        history = []
        for step in range(2 * GAP + 1):
            walk(model, optimizer, [step])
            history.append([optimizer.state[weight]["renewals"] for weight in projected_weights(optimizer)])
        counts.append(history)
    assert counts[0] == counts[1]
    assert set(counts[0][0]) == {1}
    assert len({tuple(row) for row in counts[0]}) > GAP  # they take turns


# Layers that are no nn.Linear -------------------------------------------------------------------------------------


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=1, n_head=2, vocab_size=VOCABULARY, n_positions=TOKENS, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


class Experts(nn.Module):
    """A stack of matrices; tokens go to the experts in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ParameterDict({"experts": nn.Parameter(torch.randn(3, 16, 24) / 4)})
        self.mlp_out = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp_out(torch.einsum("end,edf->enf", x, self.mlp["experts"]).tanh())


def test_conv1d_of_gpt2_is_reported_and_trained():
    model = gpt2()
    optimizer = adamw(model)
    with pytest.warns(UserWarning, match=r"4 projected weights are not of an nn\.Linear .*c_attn"):
        attachment = attach(model, optimizer, "fused")
    convolutions = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    assert [name.removesuffix(".weight") for name in attachment.formed_in_full] == convolutions
    walk(model, optimizer, range(STEPS))
    theirs = gpt2()
    walk(theirs, adamw(theirs), range(STEPS))
    assert distance(model, theirs) <= BAR


@every_mode
def test_stacked_experts_are_reported_and_trained(mode):
    ends = []
    for attaches in (True, False):
        torch.manual_seed(0)
        model = Experts()
        optimizer = adamw(model, rank=4)
        if attaches:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                attachment = attach(model, optimizer, *mode)
            reported = ["mlp.experts"] if mode[0] == "fused" else []
            assert attachment.formed_in_full == reported
            assert len(caught) == len(reported)
        for step in range(STEPS):
            x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(step))
            (model(x) - 1).square().mean().backward()
            if attaches and mode[1] == "step" and mode[0] != "full" and step == 0:
                assert isinstance(model.mlp["experts"].grad, ProjectedGradient)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model)
    assert distance(*ends) <= BAR
