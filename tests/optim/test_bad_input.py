"""What is not supported: told with the value and the remedy, and everything left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from galore_torch import GaLore, GaLoreAdamW, GaLoreSGD
from tests.optim.small import assert_same, groups, mixed, refusing, snapshot, walk, weights

MATRIX = (24, 16)


@pytest.mark.parametrize(
    ("keys", "value", "remedy"),
    [
        ({"rank": 0}, "rank is 0", "at least 1"),
        ({"rank": -3}, "rank is -3", "at least 1"),
        ({"rank": 2.5}, "rank is 2.5", "whole number"),
        ({"rank": 4.0}, "rank is 4.0", "whole number"),
        ({"rank": True}, "rank is True", "whole number"),
        ({"rank": "4"}, "rank is '4'", "whole number"),
        ({"rank": None}, "rank is None", "whole number"),
        ({"proj_type": "sideways"}, "proj_type is 'sideways'", "std, reverse_std, left, right, full"),
        ({"decomposition": "qr"}, "decomposition is 'qr'", "svd, randomized, warm, tracked, random"),
        ({"layout": "flat"}, "layout is 'flat'", "tucker, stack, reshape"),
        ({"update_proj_gap": 0}, "update_proj_gap is 0", "at least 1"),
        ({"update_proj_gap": -1}, "update_proj_gap is -1", "at least 1"),
        ({"update_proj_gap": 1.5}, "update_proj_gap is 1.5", "whole number"),
        ({"scale": 0.0}, "scale is 0.0", "positive number"),
        ({"scale": float("nan")}, "scale is nan", "positive number"),
        ({"stagger": 2}, "stagger is 2", "True or False"),
        ({"cos_threshold": 1.5}, "cos_threshold is 1.5", "from 0"),
        ({"cos_threshold": -0.1}, "cos_threshold is -0.1", "None to renew every"),
        ({"cos_threshold": float("nan")}, "cos_threshold is nan", "from 0"),
        ({"cos_threshold": True}, "cos_threshold is True", "from 0"),
        ({"gamma_proj": 1}, "gamma_proj is 1", "more than 1"),
        ({"gamma_proj": float("inf")}, "gamma_proj is inf", "more than 1"),
        ({"gamma_proj": "2"}, "gamma_proj is '2'", "more than 1"),
        ({"queue_size": 0}, "queue_size is 0", "at least 1"),
        ({"queue_size": 2.0}, "queue_size is 2.0", "whole number"),
    ],
)
@pytest.mark.parametrize("late", [False, True], ids=["at construction", "added later"])
@pytest.mark.broad
def test_a_value_that_cannot_be_served(keys, value, remedy, late):
    good, bad = weights(MATRIX, MATRIX)
    group = {"params": [bad], "rank": 4, **keys}
    message = refused_group(good, group) if late else refusing(lambda: GaLoreAdamW([group]))
    assert value in message
    assert remedy in message


def refused_group(good: Tensor, group: dict[str, Any]) -> str:
    """The message with which a group is refused by an optimizer that has made steps and goes on making them."""
    optimizer = GaLoreAdamW(groups([good]))
    walk(optimizer, [good], range(2))
    before = snapshot(optimizer)
    message = refusing(lambda: optimizer.add_param_group(group))
    assert_same(snapshot(optimizer)[:2], before[:2])
    assert snapshot(optimizer)[2] == before[2]
    walk(optimizer, [good], [2])
    return message


def cuboid() -> torch.nn.Parameter:
    return weights((4, 24, 16))[0]


@pytest.mark.parametrize(
    ("parameter", "keys", "value", "remedy"),
    [
        (lambda: weights((384,))[0], {}, "(384,)", "FSDP2"),  # a bias, or a parameter that FSDP1 has flattened
        (lambda: weights(())[0], {}, "()", "group without `rank`"),
        (lambda: weights((0, 16))[0], {}, "(0, 16)", "leave it out"),
        (lambda: torch.nn.Parameter(torch.zeros(MATRIX, dtype=torch.complex64)), {}, "complex64", "real"),
        (cuboid, {"proj_type": "left"}, "'left'", "'stack'"),
    ],
)
@pytest.mark.parametrize("late", [False, True], ids=["at construction", "added later"])
def test_a_parameter_that_cannot_be_projected_is_named(parameter, keys, value, remedy, late):
    good, spare = weights(MATRIX, MATRIX)
    group = {"params": [("fine", spare), ("layers.7.bias", parameter())], "rank": 4, **keys}
    if late:
        optimizer = GaLoreAdamW([{"params": [("good", good)], "rank": 4}])
        message = refusing(lambda: optimizer.add_param_group(group))
        assert [one["param_names"] for one in optimizer.param_groups] == [["good"]]
    else:
        message = refusing(lambda: GaLoreAdamW([group]))
    assert message.startswith("layers.7.bias")
    assert value in message
    assert remedy in message


def test_a_parameter_without_a_name_is_told_by_place_and_shape():
    message = refusing(lambda: GaLoreAdamW(groups(weights(MATRIX, (7,)), 2)))
    assert message.startswith("parameter 1 of its group, of shape (7,)")


def test_an_empty_projected_group():
    assert "(rank 4) has no parameters; check your target modules" in refusing(
        lambda: GaLoreAdamW([{"params": [], "rank": 4}])
    )
    assert "no parameters" in refused_group(weights(MATRIX)[0], {"params": iter([]), "rank": 4})


def test_no_parameters_at_all():
    assert "empty parameter list" in refusing(lambda: GaLoreAdamW([]))


@pytest.mark.parametrize("keys", [{"rank": 4}, {}], ids=["projected", "plain"])
def test_a_parameter_listed_twice(keys):
    (weight,) = weights(MATRIX)
    message = refusing(lambda: GaLoreAdamW([{"params": [weight, weight], **keys}]))
    assert "listed twice" in message
    message = refusing(lambda: GaLoreAdamW([{"params": [weight], "rank": 4}, {"params": [weight], **keys}]))
    assert "more than one parameter group" in message
    assert "more than one parameter group" in refused_group(weight, {"params": [weight], **keys})


@pytest.mark.parametrize("rank", [16, 17, 1000])
def test_a_rank_that_saves_nothing_is_allowed_and_told(rank):
    (weight,) = weights(MATRIX)
    with pytest.warns(UserWarning, match=f"rank {rank} saves no memory for 1 of 1 projected weights"):
        optimizer = GaLoreSGD([{"params": [weight], "rank": rank, "scale": 1.0, "decomposition": "svd"}], lr=0.1)
    walk(optimizer, [weight], range(3))
    expected = weights(MATRIX)
    walk(torch.optim.SGD(expected, lr=0.1), expected, range(3))
    torch.testing.assert_close(weight, expected[0], rtol=0, atol=1e-6)


def test_a_tensor_that_the_optimizer_cannot_hold():
    message = refusing(lambda: GaLore(mixed()[1], torch.optim.Muon, lr=0.1))
    assert "Muon cannot hold a tensor of 1 dimensions" in message
    assert "fallback_class=torch.optim.AdamW" in message


def test_arguments_are_checked_before_anything_is_built():
    assert "lr is -1.0; use a learning rate of at least 0" in refusing(lambda: GaLoreAdamW(mixed()[1], lr=-1.0))
    assert "momentum is -2.0; use a number of at least 0" in refusing(lambda: GaLoreSGD(mixed()[1], momentum=-2.0))


def test_what_only_the_optimizer_inside_knows_it_says():
    assert "Nesterov" in refusing(lambda: GaLoreSGD(mixed()[1], nesterov=True))
