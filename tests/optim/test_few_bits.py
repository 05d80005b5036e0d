"""Bases in few bits, states in slices, and what is said of tensors that stay as they are."""

import copy
import io
import pickle
import warnings

import bitsandbytes
import pytest
import torch
import torchao.optim

from galore_torch import GaLore, GaLoreAdamW, GaLoreAdamW8bit, GaLoreSGD, QGaLoreAdamW8bit, param_groups
from galore_torch.optim import state_bytes
from galore_torch.optim.recipes import eight_bit
from galore_torch.optim.rule import Rule
from tests.optim.small import assert_same, distance, groups, mixed, refusing, tensors_in, walk, weights

FEW = pytest.mark.parametrize("bits", [8, 4])


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@FEW
@pytest.mark.parametrize("proj_type", ["std", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_with_bases_in_few_bits_stays_near_plain_ones(bits, proj_type, dtype):
    ends = {}
    for basis_bits in (16, bits):
        trained, made = mixed(dtype, proj_type=proj_type, basis_bits=basis_bits, update_proj_gap=100)
        start = [weight.detach().clone() for weight in trained]
        walk(GaLoreSGD(made, lr=1.0, momentum=0.9), trained, range(4))
        ends[basis_bits] = [after.detach() - before for after, before in zip(trained, start, strict=True)]
    assert distance(ends[bits][:2], ends[16][:2]) < {8: 0.03, 4: 0.4}[bits]
    assert_same(ends[bits][2:], ends[16][2:])


@FEW
def test_the_state_of_a_basis_is_codes_and_scales(bits):
    trained = weights((256, 64))
    optimizer = GaLoreAdamW(groups(trained, basis_bits=bits, basis_group_size=64), lr=1e-2)
    walk(optimizer, trained, range(1))
    basis = optimizer.state[trained[0]]["basis"]["right"]
    assert basis.keys() == {"codes", "scale", "low"}
    assert basis["codes"].dtype == torch.uint8
    assert basis["codes"].numel() == 64 * 4 * bits // 8
    assert basis["scale"].shape == (64 * 4 // 64,)


@FEW
def test_a_first_step_on_zero_gradients_makes_all_state_and_fixes_no_subspace(bits):
    trained = weights((24, 16))
    optimizer = GaLoreAdamW(groups(trained, basis_bits=bits), lr=1e-2)
    trained[0].grad = torch.zeros_like(trained[0])
    optimizer.step()
    before = {key: value.shape for key, value in optimizer.state[trained[0]]["basis"]["right"].items()}
    walk(optimizer, trained, range(1))
    after = {key: value.shape for key, value in optimizer.state[trained[0]]["basis"]["right"].items()}
    assert before == after
    assert optimizer.state[trained[0]]["renewals"] == 1


@FEW
def test_a_resumed_run_is_the_same_bit_for_bit(bits):
    def built(trained):
        made = groups(trained, 2, update_proj_gap=3, basis_bits=bits)
        return QGaLoreAdamW8bit(made, lr=1e-2, min_8bit_size=16, cos_threshold=0.0)

    ends = []
    for stop in (9, 4):
        trained, _ = mixed()
        optimizer = built(trained)
        walk(optimizer, trained, range(stop))
        if stop == 4:
            state = through_a_file(optimizer.state_dict())
            optimizer = built(trained)
            optimizer.load_state_dict(state)
            walk(optimizer, trained, range(stop, 9))
        ends.append((trained, [optimizer.state[weight] for weight in trained]))
    assert_same(*ends)


@FEW
def test_codes_that_a_checkpoint_gave_back_as_floats_are_codes_again(bits):
    trained, made = mixed(basis_bits=bits)
    optimizer = GaLoreAdamW(made, lr=1e-2)
    walk(optimizer, trained, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    for one in state["state"].values():
        for packed in one.get("basis", {}).values():
            packed["codes"] = packed["codes"].float()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.load_state_dict(state)
    assert_same(optimizer.state_dict()["state"], before)


def test_another_number_of_bits_than_the_checkpoints_is_told():
    trained, made = mixed(basis_bits=8)
    state = GaLoreAdamW(made, lr=1e-2).state_dict()
    message = refusing(lambda: GaLoreAdamW(groups(trained, 2, basis_bits=4), lr=1e-2).load_state_dict(state))
    assert "basis_bits" in message


@pytest.mark.parametrize(
    ("keys", "word"), [({"basis_bits": 2}, "basis_bits"), ({"basis_group_size": 63}, "basis_group_size")]
)
def test_bits_that_cannot_be_are_told(keys, word):
    message = refusing(lambda: GaLoreAdamW(groups(weights((24, 16)), **keys), lr=1e-2))
    assert word in message
    assert "use" in message


# Q-GaLore's own words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "bits", "group_size", "threshold"),
    [
        ({}, 4, 256, 0.4),
        ({"quant": True, "quant_n_bit": 8, "quant_group_size": 64, "cos_threshold": 0.3}, 8, 64, 0.3),
        ({"quant": False, "quant_n_bit": 8}, 16, 256, 0.4),
        ({"basis_bits": 8, "basis_group_size": 32}, 8, 32, 0.4),
    ],
)
def test_groups_may_speak_as_q_galore_does(keys, bits, group_size, threshold):
    group = {"params": weights((24, 16)), "rank": 4, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", **keys}
    more = {"gamma_proj": 2, "queue_size": 5}  # as Axolotl passes them
    made = QGaLoreAdamW8bit([{**group, **more}], lr=1e-2).param_groups[0]
    assert (made["basis_bits"], made["basis_group_size"], made["cos_threshold"]) == (bits, group_size, threshold)


def test_groups_that_say_nothing_get_what_the_recipe_says_even_after_it_was_pickled():
    model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(32, 64)})
    optimizer = QGaLoreAdamW8bit(param_groups(model, rank=4), lr=1e-2, basis_bits=8, cos_threshold=None)
    optimizer = pickle.loads(pickle.dumps(optimizer))
    optimizer.add_param_group({"params": [("late", weights((24, 16))[0])], "rank": 4})
    projected = [group for group in optimizer.param_groups if "rank" in group]
    assert [(group["basis_bits"], group["cos_threshold"]) for group in projected] == [(8, None)] * 2


# Slices ---------------------------------------------------------------------------------------------------------------


def test_a_weight_moved_in_slices_moves_as_the_whole(monkeypatch):
    ends = {}
    for size in (2**22, 512):
        monkeypatch.setattr(eight_bit, "_SLICE_ELEMENTS", size)
        trained = weights((64, 96), (70, 31), (16, 16))
        optimizer = GaLoreAdamW8bit(groups(trained, 1, rank=16), lr=1e-2, min_8bit_size=256, weight_decay=0.1)
        walk(optimizer, trained, range(3))
        state = through_a_file(optimizer.state_dict())  # of one that is moved in slices as of one that is not
        monkeypatch.setattr(eight_bit, "_SLICE_ELEMENTS", 2**22 + 512 - size)
        optimizer = GaLoreAdamW8bit(groups(trained, 1, rank=16), lr=1e-2, min_8bit_size=256, weight_decay=0.1)
        optimizer.load_state_dict(state)
        walk(optimizer, trained, range(3, 6))
        ends[size] = trained, [optimizer.state[weight] for weight in trained]
    assert_same(ends[512], ends[2**22])


def test_what_is_copied_is_a_slice(monkeypatch):
    monkeypatch.setattr(eight_bit, "_SLICE_ELEMENTS", 512)
    optimizer = GaLoreAdamW8bit(trained := weights((70, 31), (16, 16)), lr=1e-2, min_8bit_size=256)
    sizes, step = [], Rule.step

    def noted(rule, params):
        sizes.append([one.tensor.numel() for one in params])
        return step(rule, params)

    walk(optimizer, trained, range(1))
    monkeypatch.setattr(Rule, "step", noted)
    walk(optimizer, trained, range(1, 3))
    assert sizes == [[512, 512, 512, 634, 256]] * 2


def test_slices_are_saved_and_loaded(monkeypatch):
    monkeypatch.setattr(eight_bit, "_SLICE_ELEMENTS", 512)
    ends = []
    for stop in (6, 3):
        trained = weights((70, 31), (24, 16))
        optimizer = GaLoreAdamW8bit(trained, lr=1e-2, min_8bit_size=256)
        walk(optimizer, trained, range(stop))
        if stop == 3:
            state = through_a_file(optimizer.state_dict())
            optimizer = GaLoreAdamW8bit(trained, lr=1e-2, min_8bit_size=256)
            optimizer.load_state_dict(state)
            walk(optimizer, trained, range(3, 6))
        ends.append((trained, [optimizer.state[weight] for weight in trained]))
    assert_same(*ends)


# What stays as it is --------------------------------------------------------------------------------------------------


def test_tensors_too_small_for_eight_bits_are_reported_once_with_their_bytes():
    trained = weights((128, 64), (64, 64), (16,))
    with pytest.warns(UserWarning, match=r"2 of 3 tensors.*528 of 1,552 numbers.*4,224 bytes") as caught:
        optimizer = GaLoreAdamW8bit(groups(trained, 2, rank=8), lr=1e-2, min_8bit_size=1000)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walk(optimizer, trained, range(2))


def test_the_reported_bytes_are_those_of_the_state():
    small, large = weights((16, 8), (64, 64))
    with pytest.warns(UserWarning, match=r"1,024 bytes"):
        optimizer = GaLoreAdamW8bit([small, large], lr=1e-2)
    walk(optimizer, [small, large], range(1))
    blocks = 64 * 64 // 256
    tables = 2 * 256 * 4
    assert state_bytes(optimizer) == 1024 + 2 * (64 * 64 + 4 * blocks) + tables


def test_nothing_is_reported_where_all_states_have_few_bits_or_none():
    trained = weights((128, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GaLoreAdamW8bit(groups(trained, rank=8), lr=1e-2, min_8bit_size=16)
        GaLoreAdamW(groups(weights((128, 64), (3,)), 1, rank=8), lr=1e-2)
        GaLore(trained, optimizer_class=bitsandbytes.optim.Lion8bit, lr=1e-2, min_8bit_size=16)


def test_torchaos_blocks_are_known():
    trained = weights((64, 64), (64, 65))
    with pytest.warns(UserWarning, match=r"1 of 2 tensors"):
        GaLore(trained, optimizer_class=torchao.optim.AdamW8bit, lr=1e-2)


@FEW
def test_tensors_in_the_state_are_plain(bits):
    trained, made = mixed(basis_bits=bits)
    optimizer = GaLoreAdamW(made, lr=1e-2)
    walk(optimizer, trained, range(2))
    assert {type(tensor) for tensor in tensors_in(optimizer.state_dict()["state"])} == {torch.Tensor}
