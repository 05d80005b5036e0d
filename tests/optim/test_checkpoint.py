"""Saved, loaded and gone on: bit for bit the run that was never stopped; or refused, with everything as it was."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from galore_torch import GaLoreAdamW
from galore_torch.galore_projector import GaLoreProjector
from galore_torch.projection import DECOMPOSITIONS
from tests.device import accelerator
from tests.optim.recipes import RECIPES, every_recipe
from tests.optim.small import MATRICES, assert_same, groups, mixed, refusing, snapshot, walk, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:rank .* saves no memory"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

DTYPES = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16, state in float32": (torch.bfloat16, {"state_dtype": torch.float32}),
}
every_dtype = pytest.mark.parametrize(("dtype", "arguments"), DTYPES.values(), ids=DTYPES)
MORE_STEPS = 4  # with a gap of 3, both weights renew in these


class Net(nn.Module):
    """Weights under names, as distributed checkpoints want them."""

    def __init__(self, dtype: torch.dtype = torch.float32, **keys: Any) -> None:
        super().__init__()
        self.weights = nn.ParameterList(mixed(dtype)[0])
        self.keys = keys

    def groups(self) -> list[dict[str, Any]]:
        made = groups(list(self.weights), 2, **{"update_proj_gap": 3, **self.keys})
        made[0]["param_names"], made[1]["param_names"] = ["weights.0", "weights.1"], ["weights.2", "weights.3"]
        return made


def through_a_file(saved: Any, *, weights_only: bool = True) -> Any:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


def run_on(net: Net, optimizer: torch.optim.Optimizer, made: int) -> tuple[Any, Any, list[int]]:
    """Goes on from the step of this number: the weights, the states and how many bases each weight has had."""
    walk(optimizer, net.weights, range(made, made + MORE_STEPS))
    states = [optimizer.state[weight] for weight in net.weights]
    return list(net.weights), states, [state["renewals"] for state in states[:2]]


# Save, load, go on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [0, 1, 2])
@every_dtype
@every_recipe
@pytest.mark.broad(
    "GaLoreAdamW-float32-0",
    "GaLoreAdamW uncorrected-bfloat16-1",
    "GaLoreAdamW8bit-bfloat16, state in float32-2",
    "GaLoreAdafactor-float32-0",
    "GaLore Muon-float32-0",
)
def test_a_resumed_run_is_the_run_itself(recipe, dtype, arguments, made):
    straight = Net(dtype)
    optimizer = recipe(straight.groups(), **arguments)
    walk(optimizer, straight.weights, range(made))
    resumed = Net(dtype)
    resumed.load_state_dict(through_a_file(straight.state_dict()))
    other = recipe(resumed.groups(), **arguments)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    expected = run_on(straight, optimizer, made)
    assert_same(run_on(resumed, other, made), expected)
    assert all(count > 1 for count in expected[2])


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("proj_type", ["std", "full"])
@pytest.mark.broad
def test_so_it_is_with_every_decomposition(decomposition, proj_type):
    keys = {"decomposition": decomposition, "proj_type": proj_type}
    straight, resumed = Net(**keys), Net(**keys)
    optimizer = GaLoreAdamW(straight.groups(), seed=3)
    walk(optimizer, straight.weights, range(2))
    resumed.load_state_dict(straight.state_dict())
    other = GaLoreAdamW(resumed.groups(), seed=3)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same(run_on(resumed, other, 2), run_on(straight, optimizer, 2))


@pytest.mark.parametrize("made", [0, 2])
@every_recipe
@pytest.mark.broad("GaLoreAdamW uncorrected-2", "GaLoreAdamW8bit-0", "GaLore Muon-0")
def test_across_accelerate(recipe, made, tmp_path):
    straight = Net()
    optimizer = recipe(straight.groups())
    accelerated = accelerator()
    model, wrapped = accelerated.prepare(straight, optimizer)
    walk(wrapped, model.weights, range(made))
    accelerated.save_state(str(tmp_path))
    expected = run_on(model, wrapped, made)

    accelerated = accelerator()
    resumed = Net()
    model, wrapped = accelerated.prepare(resumed, recipe(resumed.groups()))
    accelerated.load_state(str(tmp_path))
    assert_same(run_on(model, wrapped, made), expected)


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@every_dtype
@every_recipe
@pytest.mark.broad(
    "GaLoreAdamW uncorrected-bfloat16-flattened",
    "GaLoreAdamW8bit-bfloat16, state in float32-nested",
    "GaLoreAdafactor-float32-nested",
)
def test_across_distributed_checkpoints(recipe, dtype, arguments, flatten, tmp_path):
    """Their loading makes a step on zero gradients and rate 0 first, to see what state there is."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    straight = Net(dtype)
    optimizer = recipe(straight.groups(), **arguments)
    walk(optimizer, straight.weights, range(2))
    if flatten and torch.__version__ < "2.10":
        with pytest.raises(NotImplementedError, match=r"Flattening .* 'dict'"):  # as a basis is
            get_optimizer_state_dict(straight, optimizer, options=options)
        return
    dcp.save(get_optimizer_state_dict(straight, optimizer, options=options), checkpoint_id=tmp_path, no_dist=True)
    resumed = Net(dtype)
    resumed.load_state_dict(straight.state_dict())
    other = recipe(resumed.groups(), **arguments)
    saved = get_optimizer_state_dict(resumed, other, options=options)
    dcp.load(saved, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(resumed, other, saved, options=options)
    assert_same(snapshot(other)[:2], snapshot(optimizer)[:2])
    assert [group["lr"] for group in other.param_groups] == [group["lr"] for group in optimizer.param_groups]
    assert_same(run_on(resumed, other, 2), run_on(straight, optimizer, 2))


def test_codes_that_come_back_as_floats_become_codes_again():
    """So some distributed checkpoints give them. The step on zero gradients before shows what they were."""
    straight, resumed = Net(), Net()
    optimizer, other = (RECIPES["GaLoreAdamW8bit"](net.groups()) for net in (straight, resumed))
    walk(optimizer, straight.weights, range(2))
    resumed.load_state_dict(straight.state_dict())
    get_optimizer_state_dict(resumed, other)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        codes = {key: value for key, value in state["inner"].items() if getattr(value, "dtype", None) == torch.uint8}
        assert codes
        state["inner"].update({key: value.float() for key, value in codes.items()})
    other.load_state_dict(saved)
    assert_same(run_on(resumed, other, 2), run_on(straight, optimizer, 2))


@pytest.mark.parametrize("made", [0, 2])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
@every_recipe
@pytest.mark.broad(
    "GaLoreAdamW uncorrected-pickle-2",
    "GaLoreAdamW-deepcopy-0",
    "QGaLoreAdamW8bit-deepcopy-0",
    "GaLore Muon-deepcopy-0",
)
def test_a_copy_of_model_and_optimizer_goes_on_as_they_do(recipe, copied, made):
    net = Net()
    optimizer = recipe(net.groups())
    walk(optimizer, net.weights, range(made))
    twin, other = copied((net, optimizer))
    assert type(other) is type(optimizer)
    before = snapshot(optimizer)
    ended = run_on(twin, other, made)
    assert_same(snapshot(optimizer)[:2], before[:2])
    assert_same(run_on(net, optimizer, made), ended)


@pytest.mark.parametrize("made", [0, 2])
@every_recipe
@pytest.mark.broad("GaLoreAdamW-0", "GaLoreAdamW uncorrected-2", "GaLoreAdafactor-0", "QGaLoreAdamW8bit-0")
def test_a_group_may_be_added_after_steps(recipe, made):
    """And the run can be resumed with it. Its weights begin with a basis and a state of their own."""
    straight, resumed = Net(), Net()
    ends = []
    for net, stopped in ((straight, False), (resumed, True)):
        early, late = net.groups()[0]["params"], net.groups()[1]["params"]
        optimizer = recipe([{"params": early, "rank": 4, "update_proj_gap": 3}])
        walk(optimizer, early, range(made))
        optimizer.add_param_group({"params": late[:1], "rank": 2})
        optimizer.add_param_group({"params": late[1:]})
        walk(optimizer, net.weights, [made])
        if stopped:
            saved = through_a_file(optimizer.state_dict())
            optimizer = recipe(
                [
                    {"params": early, "rank": 4, "update_proj_gap": 3},
                    {"params": late[:1], "rank": 2},
                    {"params": late[1:]},
                ]
            )
            optimizer.load_state_dict(saved)
        ends.append(run_on(net, optimizer, made + 1))
    assert_same(*ends)
    assert optimizer.state[late[0]]["step"] == 1 + MORE_STEPS


def test_hooks_of_the_user_run_around_loading():
    optimizer = GaLoreAdamW(mixed()[1])
    trained, made = mixed()
    other = GaLoreAdamW(made)
    walk(other, trained, range(2))
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda _, given: seen.append(len(given["state"])))
    optimizer.register_load_state_dict_post_hook(lambda loaded: seen.append(len(loaded.state)))
    optimizer.load_state_dict(other.state_dict())
    optimizer.load_state_dict(other.state_dict())
    assert seen == [4, 4, 4, 4]


# Refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda made: made[0].update(rank=5), "rank=5, the checkpoint has rank=4"),
        (lambda made: made[0].update(proj_type="left"), "proj_type='left', the checkpoint has proj_type='std'"),
        (lambda made: made[0].update(layout="stack"), "layout='stack', the checkpoint has layout='tucker'"),
        (lambda made: made[0].pop("rank"), "rank=None, the checkpoint has rank=4"),
        (lambda made: made[1].update(rank=4), "rank=4, the checkpoint has rank=None"),
        (lambda made: made.append({"params": weights((3, 3))}), "of [2, 2] parameters, the optimizer of [2, 2, 1]"),
        (lambda made: made[1]["params"].pop(), "of [2, 2] parameters, the optimizer of [2, 1]"),
    ],
)
@pytest.mark.parametrize("made_steps", [0, 2])
def test_a_checkpoint_of_other_shapes_is_refused(change, reason, made_steps):
    trained, made = mixed()
    optimizer = GaLoreAdamW(made)
    walk(optimizer, trained, range(2))
    others, made = mixed()
    made[1]["params"] = made[1]["params"][:1] if "rank=4, the checkpoint has rank=None" in reason else others[2:]
    change(made)
    if "has rank=None" in reason:
        trained, saved = mixed()
        saved[1]["params"] = saved[1]["params"][:1]
        optimizer = GaLoreAdamW(saved)
        walk(optimizer, trained[:3], range(2))
    other = GaLoreAdamW(made)
    walk(other, [weight for group in made for weight in group["params"]], range(made_steps))
    before = snapshot(other)
    message = refusing(lambda: other.load_state_dict(optimizer.state_dict()))
    assert reason in message
    assert "uild the" in message  # the remedy
    assert_same(snapshot(other)[:2], before[:2])
    assert snapshot(other)[2] == before[2]


def test_values_that_may_change_come_from_the_checkpoint():
    """As torch does it: the groups' values are the checkpoint's."""
    trained, made = mixed(scale=0.5)
    optimizer = GaLoreAdamW(made, lr=0.1)
    walk(optimizer, trained, range(2))
    other = GaLoreAdamW(mixed(scale=0.25)[1], lr=0.2)
    other.load_state_dict(optimizer.state_dict())
    assert (other.param_groups[0]["scale"], other.param_groups[0]["lr"]) == (0.5, 0.1)


def test_values_that_a_checkpoint_does_not_have_stay_as_they_are():
    """An older version may have had fewer keys."""
    trained, made = mixed()
    optimizer = GaLoreAdamW(made)
    walk(optimizer, trained, range(2))
    saved = optimizer.state_dict()
    for key in ("stagger", "decomposition", "layout", "cos_threshold", "gamma_proj", "queue_size"):
        del saved["param_groups"][0][key]
    for state in [saved["state"][0], saved["state"][1]]:
        del state["gap"], state["overlaps"]
    trained, made = mixed(decomposition="random", stagger=False, cos_threshold=0.5)
    other = GaLoreAdamW(made)
    other.load_state_dict(saved)
    assert (other.param_groups[0]["decomposition"], other.param_groups[0]["stagger"]) == ("random", False)
    walk(other, trained, range(2, 6))
    assert [other.state[weight]["renewals"] for weight in trained[:2]] == [2, 2]
    assert all(other.state[weight]["overlaps"].any() for weight in trained[:2])


# galore-torch 1.0 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_state_of_galore_torch_1_is_refused_with_what_to_do(weights_only):
    """It holds a pickled projector: an object with these attributes, of a class of this name."""
    trained, made = mixed()
    optimizer = GaLoreAdamW(made)
    walk(optimizer, trained, range(2))
    projector = object.__new__(GaLoreProjector)
    vars(projector).update(rank=4, verbose=False, scale=0.25, proj_type="std", ortho_matrix=torch.zeros(4, 16))
    old = optimizer.state_dict()
    old["state"] = {0: {"step": 2, "exp_avg": torch.zeros(24, 4), "projector": projector}}
    assert type(projector).__module__ == "galore_torch.galore_projector"
    before = snapshot(optimizer)
    message = refusing(lambda: optimizer.load_state_dict(through_a_file(old, weights_only=weights_only)))
    assert "saved by galore-torch 1.0" in message
    assert "start the optimizer anew" in message
    assert_same(snapshot(optimizer)[:2], before[:2])


def test_a_projector_of_galore_torch_1_is_only_a_name():
    with pytest.raises(NotImplementedError, match="GaLoreAdamW"):
        GaLoreProjector(4, update_proj_gap=200)


@pytest.mark.parametrize("names", [["first", "second"], None], ids=["named", "unnamed"])
def test_state_of_a_weight_without_a_place_is_named_with_the_remedy(names):
    trained = weights(*MATRICES)
    optimizer = GaLoreAdamW([{"params": list(trained), "rank": 4, **({"param_names": names} if names else {})}])
    walk(optimizer, trained, range(2))
    optimizer.param_groups[0]["params"].pop(0)
    said = refusing(optimizer.state_dict)
    assert "first" in said if names else str(tuple(trained[0].shape)) in said
    assert "optimizer.state.pop" in said
    walk(optimizer, trained[1:], [2])  # it goes on, as torch's own do, and calls no weight by another's name
    assert str(tuple(trained[0].shape)) in refusing(optimizer.state_dict)
    assert all(str(tuple(trained[1].shape)) in name for name in optimizer.subspaces())
    optimizer.state.pop(trained[0])
    assert len(optimizer.state_dict()["state"]) == 1
