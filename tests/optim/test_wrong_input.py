"""What is wrong in a group, a target or an argument is told with name, value and remedy; what is right is not told.

A message is an error where nothing could be trained as it was meant, and else a warning that points at this file.
"""

import functools
import warnings

import numpy
import pytest
import torch
from torch import nn

from galore_torch import GaLore, GaLoreAdamW, GaLoreSGD, attach, param_groups, quantize_weights


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp, self.norm = nn.Linear(16, 16), nn.Linear(16, 32), nn.LayerNorm(16)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(16, 8)


class Stack(nn.Module):
    """Three matrices that nothing calls experts."""

    def __init__(self, **counts):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, 24))
        vars(self).update(counts)


def matrices():
    return [nn.Parameter(torch.randn(16, 24)), nn.Parameter(torch.randn(24, 16))]


def group(**keys):
    return lambda: GaLoreAdamW([{"params": matrices(), "rank": 4, **keys}])


def plain(**keys):
    return lambda: GaLoreAdamW([{"params": matrices(), "rank": 4}, {"params": [nn.Parameter(torch.randn(8))], **keys}])


def targets(*given, **keys):
    return lambda: param_groups(Small(), 4, *given, **keys)


def adamw(**arguments):
    return lambda: GaLoreAdamW([{"params": matrices(), "rank": 4}], **arguments)


def any_optimizer(*classes, **arguments):
    return lambda: GaLore([{"params": matrices(), "rank": 4}], *classes, **arguments)


WRONG = [
    # keys of a group that nothing reads
    (group(update_gap=50), "update_gap=50", "update_proj_gap?"),
    (group(gap=50), "gap=50", "update_proj_gap?"),
    (group(proj_typ="left"), "proj_typ='left'", "proj_type?"),
    (group(galore_scale=1.0), "galore_scale=1.0", "scale?"),
    (group(Scale=1.0), "Scale=1.0", "scale?"),
    (group(decompositon="svd"), "decompositon='svd'", "decomposition?"),
    (group(basis_bit=8), "basis_bit=8", "basis_bits?"),
    (group(quant_n_bit=4), "quant_n_bit=4", "it may have rank"),
    (group(weight_dcay=0.1), "weight_dcay=0.1", "weight_decay?"),
    (group(nesterov=True), "nesterov=True", "it may have rank"),
    (plain(Rank=4), "Rank=4", "rank?"),
    (plain(rnak=4), "rnak=4", "rank?"),
    (plain(update_proj_gap=50), "update_proj_gap=50", "give the group a `rank`"),
    (plain(update_proj_gpa=50), "update_proj_gpa=50", "update_proj_gap?"),
    # values of a group
    (group(rank="8"), "rank is '8'", "whole number"),
    (group(rank=[8]), "rank is [8]", "whole number"),
    (group(rank=numpy.float64(8)), "rank is 8.0", "whole number"),
    (group(scale=True), "scale is True", "positive number"),
    (group(scale="0.25"), "scale is '0.25'", "positive number"),
    (group(proj_type=["left"]), "proj_type is ['left']", "one of std"),
    (group(decomposition=None), "decomposition is None", "one of svd"),
    (group(basis_bits=8.0), "basis_bits is 8.0", "8 or 4"),
    (group(basis_group_size=7), "basis_group_size is 7", "even"),
    (group(cos_threshold="0.4"), "cos_threshold is '0.4'", "from 0"),
    (group(lr="1e-2"), "lr is '1e-2' in a parameter group", "use a number"),
    (group(lr=-0.1), "lr is -0.1 in a parameter group", "at least 0"),
    (plain(weight_decay="0.1"), "weight_decay is '0.1' in a parameter group", "use a number"),
    (group(betas=(0.9,)), "betas is (0.9,) in a parameter group", "(0.9, 0.999)"),
    (group(param_names=["one"]), "1 names for 2 parameters", "one for each"),
    # parameters
    (lambda: GaLoreAdamW(Small()), "params is a Small", "param_groups(model"),
    (lambda: GaLoreAdamW(matrices()[0]), "params is a Parameter", "param_groups(model"),
    (lambda: GaLoreAdamW({"params": matrices(), "rank": 4}), "params is a dict", "list of groups"),
    (lambda: GaLoreAdamW(set(matrices())), "params is a set", "list of parameters"),
    (lambda: GaLoreAdamW([{"parameters": matrices(), "rank": 4}]), "'parameters'", 'no "params"'),
    (lambda: GaLoreAdamW([{"params": Small(), "rank": 4}]), "is a Small", "list of parameters"),
    (lambda: GaLoreAdamW([{"params": ["w"], "rank": 4}]), "'w'", "list parameters"),
    (lambda: GaLoreAdamW([{"params": [matrices()[0] * 2], "rank": 4}]), "parameter 0", "nn.Parameter itself"),
    (lambda: GaLoreAdamW(Small().parameters()), "no parameter group has a `rank`", "rank=128"),
    (lambda: GaLoreAdamW([{"params": [torch.zeros(4, 4, dtype=torch.int8)], "rank": 2}]), "int8", "quantiz"),
    # targets
    (targets(["attn", "mpl"]), "'mpl'", "'mlp'?"),
    (targets(["atn", "mlp"]), "'atn'", "'attn'?"),
    (targets(["attn", "fc1"]), "'fc1'", "name other parts"),
    (targets(["query_key_value"]), "query_key_value", "could be named: head, layers.*.attn"),
    (targets(["attn", "["]), "'['", "regular expression"),
    (targets(["attn", ""]), "''", "use strings"),
    (targets(["attn", None]), "None", "use strings"),
    (targets(["all-linear"]), "'all-linear'", "give it alone"),
    (targets(7), "target_modules is 7", "list of parts of names"),
    (targets({"attn": 4}), "{'attn': 4}", "list of parts of names"),
    (targets(["norm", "attn"]), "'norm'", "name other parts"),
    (lambda: param_groups(Small().parameters(), 4), "model is a generator", "nn.Module itself"),
    (targets(update_gap=50), "update_gap=50", "update_proj_gap?"),
    (targets(scale=0), "scale is 0", "positive number"),
    (targets(weight_decay="0.1"), "weight_decay is '0.1'", "at least 0"),
    (targets(others_lr="1e-3"), "others_lr is '1e-3'", "learning rate"),
    (targets(summary="yes"), "summary is 'yes'", "True or False"),
    (lambda: quantize_weights(Small(), ["attn"], seed="1"), "seed is '1'", "whole number"),
    # arguments
    (adamw(lr="1e-2"), "lr is '1e-2'", "use a number"),
    (adamw(lr=None), "lr is None", "learning rate"),
    (adamw(lr=float("nan")), "lr is nan", "learning rate"),
    (adamw(lr=float("inf")), "lr is inf", "learning rate"),
    (adamw(eps="1e-8"), "eps is '1e-8'", "use a number"),
    (adamw(betas=0.9), "betas is 0.9", "(0.9, 0.999)"),
    (adamw(betas=(0.9, 1.5)), "betas is (0.9, 1.5)", "below 1"),
    (adamw(weight_decay=-1), "weight_decay is -1", "at least 0"),
    (adamw(state_dtype="float32"), "state_dtype is 'float32'", "torch.float32"),
    (adamw(state_dtype=torch.int8), "state_dtype is torch.int8", "torch.float32"),
    (adamw(skip_nonfinite="no"), "skip_nonfinite is 'no'", "True or False"),
    (adamw(seed=1.5), "seed is 1.5", "whole number"),
    (any_optimizer("adamw"), "optimizer_class is 'adamw'", "pass a class"),
    (any_optimizer(torch.optim.SGD(matrices())), "a SGD", "pass a class"),
    (any_optimizer(functools.partial(torch.optim.SGD, lr=0.1)), "a partial", "by name"),
    (any_optimizer(torch.optim.SGD, "adamw"), "fallback_class is 'adamw'", "pass a class"),
    (any_optimizer(torch.optim.SGD, momentun=0.9), "momentun=0.9", "momentum?"),
    (any_optimizer(torch.optim.SGD, torch.optim.AdamW, momentun=0.9), "momentun=0.9", "momentum?"),
    (lambda: attach("model", GaLoreSGD(matrices())), "model is a str", "nn.Module"),
]


def messages(action):
    """All that an action says, as warnings or as an error; warnings that point elsewhere do not count."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            action()
        except ValueError as error:
            return [str(error)]
    return [str(one.message) for one in caught if one.filename == __file__]


@pytest.mark.parametrize(("action", "value", "remedy"), WRONG, ids=lambda part: part if isinstance(part, str) else "")
def test_what_is_wrong_is_told_with_its_value_and_the_remedy(action, value, remedy):
    (message,) = (one for one in messages(action) if value in one)
    assert remedy in message


RIGHT = {
    "keys of schedulers and frameworks": group(
        lr=0.1,
        weight_decay=0.1,
        initial_lr=0.1,
        lr_scale=0.5,
        name="blocks",
        group_name="x",
        fused=False,
        foreach=False,
    ),
    "an owner's keys of a plain group": plain(scale=3, layout="grid", depth=4, my_own=[1], lr_scale=2, stagger=None),
    "numpy's numbers": group(
        rank=numpy.int64(4), scale=numpy.float32(0.5), stagger=numpy.bool_(True), lr=numpy.float64(1)
    ),
    "usual names": targets(("attn", "mlp")),
    "nothing said": targets(),
    "all-linear": targets("all-linear"),
    "one parameter of many optimizers": lambda: GaLoreAdamW([{"params": [matrices()[0]]}]),
}


@pytest.mark.parametrize("action", RIGHT.values(), ids=RIGHT)
def test_what_is_right_is_not_told(action):
    assert messages(action) == []


def test_numbers_of_numpy_are_kept_as_pythons():
    made = GaLoreAdamW(
        [{"params": matrices(), "rank": numpy.int32(4), "scale": numpy.float32(0.5)}], lr=numpy.float64(0.1)
    )
    assert {type(made.param_groups[0][key]) for key in ("rank", "scale", "lr")} == {int, float}


def test_one_word_for_one_matter():
    """What groups and optimizer both could say is said once, of all groups together."""
    model = nn.ModuleDict({"mlp": nn.Linear(8, 8), "attn": nn.Linear(8, 8), "experts": Stack()})
    said = messages(lambda: GaLoreAdamW(param_groups(model, 16, "all-linear")))
    assert len(said) == 1
    assert said[0].startswith("rank 16 saves no memory for 3 of 3")


@pytest.mark.parametrize(
    ("module", "keys", "layout"),
    [(Stack(), {}, None), (Stack(num_experts=3), {}, "stack"), (Stack(), {"layout": "reshape"}, "reshape")],
    ids=["unknown", "counted", "asked for"],
)
def test_three_dimensions_are_projected_where_it_is_known_how(module, keys, layout):
    model = nn.ModuleDict({"mlp": nn.Linear(16, 24), "other": module})
    made = [one for one in param_groups(model, 4, "all-linear", **keys) if "other.weight" in one["param_names"]]
    assert made[0].get("layout") == layout


def test_groups_with_and_without_names_live_together():
    first, second, third = (nn.Parameter(torch.randn(16, 24)) for _ in range(3))
    made = GaLoreAdamW([{"params": [("first", first)], "rank": 4}])
    made.add_param_group({"params": [second], "rank": 4})
    assert [one["param_names"] for one in made.param_groups] == [["first"], ["param_groups.1.0"]]
    made = GaLoreAdamW([{"params": [first], "rank": 4}])
    made.add_param_group({"params": [("second", second), third], "rank": 4})
    assert [one["param_names"] for one in made.param_groups] == [["param_groups.0.0"], ["second", "param_groups.1.1"]]


def test_frozen_codes_are_no_reason_to_stop():
    weight, codes = matrices()[0], torch.zeros(8, 8, dtype=torch.int8)
    made = GaLoreAdamW([{"params": [weight, codes], "rank": 4}])
    before = weight.detach().clone()
    weight.square().sum().backward()
    made.step()
    assert not torch.equal(weight, before)
    assert not codes.any()
