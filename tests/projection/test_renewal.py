"""When a basis is renewed: once a gap, spread over the layers, and not before or after a layer's turn."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galore_torch.projection import adapt_gap, is_due, turn_offset


def renewals(steps, gap, offset, unable=()):
    """The steps in which a layer renews, which cannot in the steps of `unable`."""
    renewed, last = [], -1
    for step in range(steps):
        if is_due(step, last, gap, offset) and step not in unable:
            renewed.append(step)
            last = step
    return renewed


def test_all_at_once_is_every_gap():
    assert renewals(1000, gap=200, offset=0) == [0, 200, 400, 600, 800]


@pytest.mark.parametrize(("offset", "expected"), [(1, [0, 1, 6, 11]), (3, [0, 3, 8, 13]), (5, [0, 5, 10])])
def test_taking_turns_is_every_gap_after_the_first_turn(offset, expected):
    assert renewals(15, gap=5, offset=offset) == expected


def test_a_gap_of_one_renews_in_every_step():
    assert renewals(5, gap=1, offset=turn_offset(0, 1, 1)) == [0, 1, 2, 3, 4]
    assert renewals(5, gap=1, offset=0) == [0, 1, 2, 3, 4]


def test_a_missed_turn_stays_due_until_it_is_taken_and_the_next_keeps_its_place():
    assert renewals(40, gap=10, offset=4, unable={4, 5, 6}) == [0, 7, 14, 24, 34]
    assert renewals(40, gap=10, offset=4, unable=range(4, 18)) == [0, 18, 24, 34]  # two turns missed are one
    assert renewals(12, gap=10, offset=0, unable={0, 1}) == [2, 10]  # so is the first basis of all


@given(st.integers(1, 300), st.integers(1, 400), st.data())
def test_every_layer_takes_one_turn_in_every_window_of_a_gap(count, gap, data):
    index = data.draw(st.integers(0, count - 1))
    offset = turn_offset(index, count, gap)
    assert 1 <= offset <= gap
    steps = renewals(4 * gap + 1, gap, offset)
    assert steps == [0, *range(offset, 4 * gap + 1, gap)]


@given(st.integers(1, 300), st.integers(1, 400))
def test_turns_are_spread_evenly(count, gap):
    """No step has more turns than an even spread must give it, and the layers take theirs in order."""
    turns = [0] * (gap + 1)
    for index in range(count):
        turns[turn_offset(index, count, gap)] += 1
    assert max(turns) <= -(-count // gap)
    offsets = [turn_offset(index, count, gap) for index in range(count)]
    assert offsets == sorted(offsets)
    assert offsets[-1] == gap


@given(st.integers(1, 1000), st.floats(1.01, 10), st.integers(0, 20))
def test_a_lazy_gap_grows_while_the_subspace_stays_and_shrinks_to_its_least_where_it_moves(least, factor, stays):
    gaps = [least]
    for step in range(2 * stays + 20):
        overlap = 0.5 if step < stays else 0.4
        gaps.append(adapt_gap(gaps[-1], overlap, least=least, threshold=0.5, factor=factor))
    grown, shrunk = gaps[: stays + 1], gaps[stays:]
    assert grown == sorted(set(grown))  # strictly
    assert shrunk == sorted(shrunk, reverse=True)
    assert all(type(gap) is int for gap in gaps)
    assert min(gaps) == least
    assert gaps[stays] >= least * factor**stays * 0.5
    assert adapt_gap(least, 0.0, least=least, threshold=0.5, factor=factor) == least
