"""Small updates of weights of 16 bits: right on average, kept to the end, and the same wherever they are drawn."""

import pytest
import torch

from galore_torch.lowbit import add_rounded
from galore_torch.lowbit.rounding import round_at_random

DTYPES = [torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@every_dtype
@pytest.mark.parametrize("scale", [1.0, 3e-7, 1e4])
@pytest.mark.broad("1.0-dtype0")
def test_rounding_at_random_goes_to_a_neighbour_and_is_right_on_average(dtype, scale):
    exact = scale * (1 + torch.rand(64, generator=torch.Generator().manual_seed(0)))
    drawn = torch.stack([round_at_random(exact, dtype, key).float() for key in range(2000)])
    assert (drawn.amax(0) - drawn.amin(0) <= (exact.to(dtype).float() - exact).abs() * 2 + 2 * unit(dtype, exact)).all()
    assert ((drawn.mean(0) - exact).abs() <= 0.1 * unit(dtype, exact)).all()


def unit(dtype, exact):
    digits = torch.finfo(dtype)
    return 2 ** torch.log2(exact).floor().clamp(min=torch.tensor(digits.smallest_normal).log2().item()) * digits.eps


@every_dtype
def test_numbers_of_the_dtype_stay(dtype):
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, torch.finfo(dtype).max, float("inf"), -float("inf")]).to(dtype)
    assert torch.equal(round_at_random(exact.float(), dtype, 7), exact)
    assert round_at_random(torch.tensor([float("nan")]), dtype, 7).isnan().all()


def test_draws_depend_on_key_and_place_alone(monkeypatch):
    from galore_torch.lowbit import rounding

    ends = []
    for block in (1, 2**20):
        monkeypatch.setattr(rounding, "BLOCK_ELEMENTS", block)
        weight = torch.ones(8, 8, dtype=torch.bfloat16)
        add_rounded(weight, lambda rows: torch.full((8, 8), 1e-3)[rows], key=3)
        ends.append(weight)
    assert torch.equal(*ends)
    assert len(ends[0].unique()) > 1
    add_rounded(weight := torch.ones(8, 8, dtype=torch.bfloat16), lambda rows: torch.full((8, 8), 1e-3)[rows], key=4)
    assert not torch.equal(weight, ends[0])


@every_dtype
@pytest.mark.parametrize("shape", [(), (5,), (6, 4), (2, 3, 4)])
def test_compensation_ends_where_float32_ends(dtype, shape):
    weight, kept, exact = torch.ones(shape, dtype=dtype), torch.zeros(shape, dtype=dtype), torch.ones(shape)
    update = torch.full(shape or (1,), 3e-4)
    for _ in range(200):
        add_rounded(weight, lambda rows: update[rows], alpha=-1.0, beta=0.9999, compensation=kept)
        exact = exact * 0.9999 - 3e-4
    # What two numbers of 16 bits hold.
    torch.testing.assert_close(weight.float() + kept.float(), exact, rtol=1e-4, atol=0)
