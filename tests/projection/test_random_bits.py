import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galore_torch.random_bits import key_of, random_bits, uniform


def bits(count, key, first=0):
    return random_bits(torch.arange(first, first + count, dtype=torch.int32), torch.tensor(key, dtype=torch.int32))


def lowbias32(word):
    """The hash as its author writes it, in whole numbers."""
    word ^= word >> 16
    word = word * 0x7FEB352D % 2**32
    word ^= word >> 15
    word = word * 0x846CA68B % 2**32
    return word ^ (word >> 16)


@settings(max_examples=50, deadline=None)
@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1))
def test_they_are_the_published_hash_of_place_and_key(place, key):
    made = int(random_bits(torch.tensor(place, dtype=torch.int32), torch.tensor(key, dtype=torch.int32)))
    assert made % 2**32 == lowbias32((place ^ key) % 2**32)


def test_in_parts_they_are_the_same_as_at_once():
    assert torch.equal(torch.cat((bits(100, 7), bits(156, 7, first=100))), bits(256, 7))


def test_each_bit_and_each_pair_of_neighbours_is_as_chance_has_it():
    count = 2**16
    words = bits(count, key_of(3, 1))
    ones = torch.stack([(words >> place) & 1 for place in range(32)]).float()
    bound = 5 * 0.5 / count**0.5  # five standard deviations
    assert (ones.mean(1) - 0.5).abs().max() < bound
    assert ((ones[:, 1:] == ones[:, :-1]).float().mean(1) - 0.5).abs().max() < bound


def test_numbers_are_spread_evenly_and_other_steps_give_others():
    first, second = (uniform(bits(2**16, key_of(0, step))) for step in (1, 2))
    assert first.min() >= 0
    assert first.max() < 1
    assert torch.histc(first, 64, 0, 1).sub(1024).abs().max() < 5 * 1024**0.5
    both = torch.stack((first, second))
    assert torch.corrcoef(both)[0, 1].abs() < 5 / 2**8


@pytest.mark.parametrize("numbers", [(0,), (0, 0), (1, 0), (0, 1), (-1,), (2**70, 3)])
def test_keys_differ_and_fit_into_32_bits(numbers):
    others = [(0,), (0, 0), (1, 0), (0, 1), (-1,), (2**70, 3)]
    assert -(2**31) <= key_of(*numbers) < 2**31
    assert [key_of(*one) == key_of(*numbers) for one in others].count(True) == 1
