"""A model whose weights are kept in INT8: made, moved by an optimizer, saved and loaded, and what is refused."""

import copy
import io
import math
import weakref

import pytest
import torch
from torch import Tensor, nn

from galore_torch import (
    GaLore,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreSGD,
    dequantize_weights,
    param_groups,
    quantize_weights,
)
from galore_torch.lowbit import QuantizedWeight
from tests.optim.small import assert_same, gradient, tensors_in

GROUP = 32


class Small(nn.Module):
    """An embedding, a layer that is projected, one that is not, and a head."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 24)
        self.attn = nn.ModuleDict({"q": nn.Linear(24, 40, bias=False), "o": nn.Linear(40, 24)})
        self.mlp = nn.Linear(24, 24)
        self.head = nn.Linear(24, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        h = h + self.attn["o"](self.attn["q"](h).tanh())
        return self.head(h + self.mlp(h).tanh())


def quantized(dtype: torch.dtype = torch.float32, **keys) -> Small:
    model = Small(dtype)
    quantize_weights(model, **{"group_size": GROUP, **keys})
    return model


def codes(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that a model stores."""
    kept = {}
    for name, weight in model.named_parameters():
        if isinstance(weight, QuantizedWeight):
            kept |= {f"{name}.codes": weight.codes.clone(), f"{name}.scale": weight.scale.clone()}
        else:
            kept[name] = weight.detach().clone()
    return kept


def groups(model: nn.Module, **keys) -> list[dict]:
    """`attn` is projected; `mlp` is in INT8 and is not."""
    return param_groups(model, rank=4, target_modules=["attn"], update_proj_gap=3, **keys)


def walk(model: nn.Module, optimizer: torch.optim.Optimizer, steps) -> None:
    for step in steps:
        for index, weight in enumerate(model.parameters()):
            weight.grad = gradient(weight, step, index)
        optimizer.step()
    optimizer.zero_grad()


# Making ---------------------------------------------------------------------------------------------------------------


def test_the_weights_of_matching_layers_are_quantized_and_all_else_is_left():
    model = Small()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    kept = dict(model.named_parameters())
    assert quantize_weights(model, group_size=GROUP) == ["attn.q.weight", "attn.o.weight", "mlp.weight"]
    for name, weight in model.named_parameters():
        assert isinstance(weight, QuantizedWeight) == (name in ("attn.q.weight", "attn.o.weight", "mlp.weight"))
        assert isinstance(weight, nn.Parameter)
        assert weight.requires_grad
        if not isinstance(weight, QuantizedWeight):
            assert weight is kept[name]
        assert (weight - before[name]).abs().max() <= 0.01 * before[name].abs().max()


def test_frozen_weights_stay_frozen_and_seeds_differ():
    model = Small()
    model.mlp.weight.requires_grad_(False)
    quantize_weights(model, seed=5)
    assert not model.mlp.weight.requires_grad
    assert len({model.attn["q"].weight.seed, model.attn["o"].weight.seed, model.mlp.weight.seed}) == 3
    assert quantized(seed=5).mlp.weight.seed != quantized(seed=6).mlp.weight.seed
    assert quantized(stochastic_rounding=False).mlp.weight.seed is None


def test_never_two_copies_of_all_weights(monkeypatch):
    model = Small()
    before = [weakref.ref(weight) for weight in (model.attn["q"].weight, model.attn["o"].weight, model.mlp.weight)]
    alive, make = [], QuantizedWeight.of

    def noting(weight, *args):
        alive.append(sum(one() is not None for one in before))
        return make(weight, *args)

    monkeypatch.setattr(QuantizedWeight, "of", noting)
    quantize_weights(model)
    assert alive == [3, 2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_back_to_plain_weights(dtype):
    model = quantized(dtype)
    decoded = {name: weight.detach().contiguous() for name, weight in model.named_parameters()}
    assert dequantize_weights(model) == ["attn.q.weight", "attn.o.weight", "mlp.weight"]
    for name, weight in model.named_parameters():
        assert type(weight) is nn.Parameter
        assert weight.dtype == dtype
        assert weight.requires_grad
        assert torch.equal(weight, decoded[name])
    assert dequantize_weights(model) == []


def test_a_weight_that_linear_layers_share_is_quantized_once():
    model = nn.ModuleDict({"attn": nn.Linear(8, 8), "mlp": nn.Linear(8, 8)})
    model["mlp"].weight = model["attn"].weight
    assert quantize_weights(model) == ["attn.weight"]
    assert model["mlp"].weight is model["attn"].weight


# Moving ---------------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "AdamW": lambda model: GaLoreAdamW(groups(model), lr=0.05, weight_decay=0.1),
    "SGD, L2": lambda model: GaLoreSGD(groups(model), lr=0.05, momentum=0.9, weight_decay=0.1),
    "Adafactor": lambda model: GaLoreAdafactor(groups(model), weight_decay=0.1),
    "states in float32": lambda model: GaLoreAdamW(groups(model), lr=0.05, state_dtype=torch.float32),
    "tensor rate": lambda model: GaLoreAdamW(groups(model), lr=torch.tensor(0.05), weight_decay=0.1, fused=False),
    "left": lambda model: GaLoreAdamW(groups(model, proj_type="left"), lr=0.05),
    "full": lambda model: GaLoreAdamW(groups(model, proj_type="full"), lr=0.05),
    "others": lambda model: GaLore(
        groups(model), torch.optim.SGD, torch.optim.AdamW, lr=0.05, weight_decay=0.1, momentum=0.9
    ),
}
every_optimizer = pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)


@every_optimizer
@pytest.mark.broad("AdamW", "SGD, L2", "left", "Adafactor", "states in float32")
def test_a_step_is_the_plain_step_rounded_to_codes(build):
    """With decay, whatever its kind, and where the optimizer reads the weight."""
    model = quantized(stochastic_rounding=False)
    plain = copy.deepcopy(model)
    dequantize_weights(plain)
    walk(model, build(model), [0])
    walk(plain, build(plain), [0])
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if not isinstance(ours, QuantizedWeight):
            torch.testing.assert_close(ours, theirs)
            continue
        expected = QuantizedWeight.of(theirs, GROUP)
        apart = (ours.codes.int() - expected.codes.int()).abs()
        assert apart.max() <= 1, name
        assert (apart > 0).sum() <= 2, name  # numbers that lie between two codes, and come out last bits apart


@every_optimizer
@pytest.mark.broad("AdamW", "others", "left", "SGD, L2")
def test_saved_and_resumed_it_goes_on_exactly(build):
    whole = quantized()
    walk(whole, build(whole), range(7))
    first = quantized()
    optimizer = build(first)
    walk(first, optimizer, range(4))
    file = io.BytesIO()
    torch.save((first.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second = quantized()
    optimizer = build(second)
    second.load_state_dict(weights)
    optimizer.load_state_dict(state)
    walk(second, optimizer, range(4, 7))
    assert_same(codes(second), codes(whole))


def test_the_state_of_random_numbers_has_no_part_in_it():
    ends = []
    for draws in (0, 5):
        model = quantized()
        optimizer = GaLoreAdamW(groups(model), lr=0.05)
        for step in range(3):
            torch.rand(draws)
            walk(model, optimizer, [step])
        ends.append(codes(model))
    assert_same(*ends)


def test_codes_keep_their_storage_and_state_has_the_weights_dtype():
    model = quantized(torch.bfloat16)
    before = [(weight, weight.codes.data_ptr()) for weight in (model.attn["q"].weight, model.mlp.weight)]
    optimizer = GaLoreAdamW(groups(model), lr=0.05)
    walk(model, optimizer, range(2))
    assert [(weight, weight.codes.data_ptr()) for weight in (model.attn["q"].weight, model.mlp.weight)] == before
    state = optimizer.state[model.attn["q"].weight]
    moments = [tensor for tensor in tensors_in([state["inner"], state["basis"]]) if tensor.dim()]
    assert {tensor.dtype for tensor in moments} == {torch.bfloat16}
    assert {type(tensor) for tensor in tensors_in(optimizer.state_dict())} == {Tensor}


def test_less_than_half_a_code_counts_only_if_rounded_at_random():
    moved = {}
    for rounding in (True, False):
        model = quantized(stochastic_rounding=rounding)
        start = model.mlp.weight.decode()
        walk(model, GaLoreAdamW(groups(model), lr=1e-5), range(30))
        moved[rounding] = (model.mlp.weight.decode() - start).abs().sum()
    assert moved[False] == 0
    assert moved[True] > 0


def test_an_optimizer_for_the_rest_that_cannot_run_on_coordinates_is_refused_by_name():
    class NormScaled(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.grad.mul_(weight.norm())
            return super().step(closure)

    model = Small()
    GaLore(groups(model), fallback_class=NormScaled, lr=0.1)
    with pytest.raises(ValueError, match="NormScaled cannot run inside GaLore"):
        GaLore(groups(quantized()), fallback_class=NormScaled, lr=0.1)


# Saving and loading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_checkpoint_of_decoded_weights_loses_nothing(dtype):
    model = quantized(dtype)
    walk(model, GaLoreAdamW(groups(model), lr=0.05), range(3))
    plain = Small(dtype)
    plain.load_state_dict(model.state_dict())  # codes into a plain model are decoded
    assert all(type(weight) is nn.Parameter for weight in plain.parameters())
    again = quantized(dtype)
    again.load_state_dict(plain.state_dict())  # and the reverse
    assert_same(codes(again), codes(model))


def test_codes_of_other_groups_are_taken_as_numbers():
    model, other = quantized(), quantized(group_size=16)
    model.load_state_dict(other.state_dict())
    assert model.mlp.weight.group_size == GROUP
    assert torch.equal(model.mlp.weight.codes, QuantizedWeight.of(other.mlp.weight.decode(), GROUP).codes)


def test_assigned_codes_make_a_model_of_codes():
    plain = Small()
    plain.load_state_dict(quantized().state_dict(), assign=True)
    assert isinstance(plain.mlp.weight, QuantizedWeight)
    assert isinstance(plain.mlp.weight, nn.Parameter)
    assert_same(codes(plain), codes(quantized()))


def test_numbers_that_are_not_finite_are_told_by_name_when_they_are_loaded():
    broken = Small().state_dict()
    broken["mlp.weight"][3, 4] = math.nan
    model = quantized()
    before = model.mlp.weight.codes.clone()
    with pytest.raises(RuntimeError, match=r'"mlp.weight".*not finite'):
        model.load_state_dict(broken)
    assert torch.equal(model.mlp.weight.codes, before)
