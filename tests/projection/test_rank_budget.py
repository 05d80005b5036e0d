"""Ranks within a budget of bytes: the best ones there are, whatever the gradients."""

import itertools

import pytest
import torch

from galore_torch.projection.rank_budget import ranks_within


def curves(seed, sides=(5, 4, 6)):
    """What ranks capture, each further direction less than the last, as of a gradient's own singular values."""
    generator = torch.Generator().manual_seed(seed)
    energies = [
        torch.rand(side, generator=generator, dtype=torch.float64).sort(descending=True).values for side in sides
    ]
    return [energy.cumsum(0) / energy.sum() for energy in energies]


def captured(held, ranks):
    return sum(float(curve[rank - 1]) for curve, rank in zip(held, ranks, strict=True))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 1, 2)], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_no_other_ranks_capture_more_in_as_many_bytes(seed, sizes):
    """Exactly, where a rank of each costs as much; else to what one further rank would bring that does not fit."""
    held, most = curves(seed), [5, 4, 6]
    rivals = list(itertools.product(*(range(1, side + 1) for side in most)))

    def taken(ranks):
        return sum(rank * size for rank, size in zip(ranks, sizes, strict=True))

    for budget in range(sum(sizes), taken(most) + 1):
        ranks = ranks_within(budget, held, sizes, most=most)
        assert taken(ranks) <= budget
        best = max(captured(held, rival) for rival in rivals if taken(rival) <= budget)
        further = [
            float(curve[rank] - curve[rank - 1]) for curve, rank in zip(held, ranks, strict=True) if rank < len(curve)
        ]
        missed = max(further, default=0.0) if len({*sizes}) > 1 else 0.0
        assert captured(held, ranks) >= best - missed - 1e-12
    assert ranks == most


def test_what_is_enough_for_one_leaves_bytes_to_the_others():
    held = [torch.tensor([0.6, 0.9, 1.0, 1.0]), torch.tensor([0.3, 0.5, 0.7, 0.8])]
    assert ranks_within(5, held, [1, 1], most=[2, 4]) == [2, 3]
    assert ranks_within(100, held, [1, 1], most=[2, 4]) == [2, 4]
    assert ranks_within(6, held, [1, 1], most=[3, 4], multiple=2) == [2, 4]


def test_a_curve_that_rises_faster_further_on_is_seen():
    held = [torch.tensor([0.1, 0.1, 0.9]), torch.tensor([0.5, 0.6, 0.7])]
    assert ranks_within(4, held, [1, 1], most=[3, 3]) == [3, 1]


def test_a_budget_below_the_least_ranks_is_refused():
    with pytest.raises(ValueError, match=r"budget of 15 B is 17 B less than ranks of 4"):
        ranks_within(15, curves(0, (8, 8)), [4, 4], most=[8, 8], multiple=4)
