"""Ranks by layer from a model's gradients: planted ranks are found, and a budget is kept by the state that results."""

import numpy
import pytest
import torch
from torch import nn

from galore_torch import GaLoreAdamW, GaLoreMuon, attach, choose_ranks, param_groups
from galore_torch.optim import state_bytes

PLANTED = {"0.mlp": 2, "1.mlp": 6, "2.mlp": 12}


def planted(dtype=torch.float32):
    """Three layers whose gradients have these ranks, of directions that are equally strong."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.ModuleDict({"mlp": nn.Linear(24, 40, bias=False)}) for _ in PLANTED]).to(dtype)
    for (_, rank), layer in zip(PLANTED.items(), model, strict=True):
        left, right = (torch.linalg.qr(torch.randn(size, rank)).Q for size in (40, 24))
        layer["mlp"].weight.grad = (left @ right.mT).to(dtype)
    return model


def test_the_ranks_of_gradients_are_found_where_there_is_room():
    assert choose_ranks(planted(), 1e6, energy=0.999, multiple=1) == PLANTED
    assert choose_ranks(planted(), 1e6, energy=0.999, multiple=4) == {"0.mlp": 4, "1.mlp": 8, "2.mlp": 12}
    assert choose_ranks(planted(), 1e6, energy=0.5, multiple=1) == {"0.mlp": 1, "1.mlp": 3, "2.mlp": 6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("recipe", "moments"), [(GaLoreAdamW, 2), (GaLoreMuon, 1)])
def test_the_state_of_the_chosen_ranks_keeps_the_budget(recipe, moments, dtype):
    model, width = planted(dtype), torch.finfo(dtype).bits // 8
    a_rank = width * (24 + moments * 40)
    ranks = choose_ranks(model, 12 * a_rank, energy=0.999, multiple=1, moments=moments)
    # A rank of the first captures half of its gradient, of the second a sixth, of the third a twelfth.
    assert ranks == {"0.mlp": 2, "1.mlp": 6, "2.mlp": 4}
    optimizer = recipe(param_groups(model, rank=1, rank_pattern=ranks), lr=0.01)
    assert {group["rank"] for group in optimizer.param_groups} == {2, 4, 6}
    optimizer.step()
    assert state_bytes(optimizer) <= 12 * a_rank + 3 * 100  # counters and the last overlaps


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: model[1]["mlp"].weight.__setattr__("grad", None), r"grad of 1\.mlp\.weight is None"),
        (lambda model: model[2]["mlp"].weight.grad.zero_(), r"grad of 2\.mlp\.weight is zero or not finite"),
        (lambda model: model[0]["mlp"].weight.grad.fill_(torch.nan), r"grad of 0\.mlp\.weight is zero or not finite"),
    ],
)
def test_a_gradient_that_tells_nothing_is_refused(change, words):
    model = planted()
    change(model)
    with pytest.raises(ValueError, match=words):
        choose_ranks(model, 1e6)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"budget": 10}, "budget of 10 B is .* less than ranks of 8"),
        ({"energy": 0}, "energy is 0;"),
        ({"energy": 1.5}, "energy is 1.5;"),
        ({"multiple": 0}, "multiple is 0;"),
        ({"multiple": 1.5}, r"multiple is 1\.5;"),
        ({"moments": "2"}, "moments is '2';"),
        ({"moments": -1}, "moments is -1;"),
        ({"budget": float("nan")}, "budget is nan;"),
        ({"budget": "10kB"}, "budget is '10kB';"),
        ({"budget": None}, "budget is None;"),
    ],
)
def test_values_out_of_range_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        choose_ranks(planted(), **{"budget": 1e6, **given})


def test_projected_gradients_are_refused():
    model = nn.Sequential(nn.ModuleDict({"mlp": nn.Linear(24, 40, bias=False)}))
    attach(model, GaLoreAdamW(param_groups(model, rank=2)), "fused")
    for _ in range(2):
        model[0]["mlp"](torch.randn(8, 24)).square().sum().backward()
    with pytest.raises(ValueError, match=r"grad of 0\.mlp\.weight is projected"):
        choose_ranks(model, 1e6)


def test_names_of_layers_and_ends_of_names_are_a_pattern():
    model = nn.Sequential(*[nn.ModuleDict({"mlp": nn.Linear(24, 40), "attn": nn.Linear(24, 24)}) for _ in range(2)])
    groups = param_groups(model, rank=3, rank_pattern={"mlp": 5, "1.mlp": 7})
    ranks = {name: group["rank"] for group in groups if "rank" in group for name in group["param_names"]}
    assert ranks == {"0.mlp.weight": 5, "1.mlp.weight": 7, "0.attn.weight": 3, "1.attn.weight": 3}
    for pattern, words in (
        ({"lp": 4}, "name ends by lp"),
        ({"mlp": 0}, "rank is 0"),
        (["mlp"], "is no mapping"),
        ({1: 4}, "has 1 for a name"),
        ({"mlp": 4, "mlp.weight": 8}, "twice"),
    ):
        with pytest.raises(ValueError, match=words):
            param_groups(model, rank=3, rank_pattern=pattern)


@pytest.mark.parametrize("name", ["1.mlp.weight", "1.mlp", "_orig_mod.1.mlp"])
@pytest.mark.parametrize("wrap", [nn.Module.train, torch.compile], ids=["plain", "compiled"])
def test_a_layer_may_be_called_as_the_model_or_its_wrapper_calls_it(name, wrap):
    model = wrap(nn.Sequential(*[nn.ModuleDict({"mlp": nn.Linear(24, 40)}) for _ in range(2)]))
    ranked = [group["rank"] for group in param_groups(model, rank=3, rank_pattern={name: 7}) if "rank" in group]
    assert ranked == [3, 7]


@pytest.mark.parametrize("name", ["mlp.weight", "*.mlp.weight", "*.mlp"])
def test_ends_may_be_written_as_messages_show_them(name):
    model = nn.Sequential(*[nn.ModuleDict({"mlp": nn.Linear(24, 40)}) for _ in range(2)])
    assert param_groups(model, rank=3, rank_pattern={name: 7})[0]["rank"] == 7


def test_numbers_of_numpy_and_no_limit_are_served():
    given = {"energy": numpy.float32(0.999), "multiple": numpy.int64(1)}
    assert choose_ranks(planted(), numpy.float64(1e6), **given) == PLANTED
    assert choose_ranks(planted(), float("inf"), **given) == PLANTED
