import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galore_torch.lowbit import Codes
from galore_torch.lowbit.codes import symmetric_codes, symmetric_numbers
from galore_torch.random_bits import key_of

SEED = torch.Generator().manual_seed(0)


def at_random(tensor: torch.Tensor, bits: int, group_size: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Symmetric codes that are rounded at random, their scales, and the numbers that they stand for."""
    key = torch.tensor(key_of(seed), dtype=torch.int32)
    codes, scale = symmetric_codes(tensor.view(-1, group_size), bits, key)
    return codes.flatten(), scale, symmetric_numbers(codes, scale, bits).flatten()


def step_of(codes: Codes, group_size: int) -> torch.Tensor:
    """How far neighbouring numbers are apart, for each number of the tensor."""
    top = 1 if codes.low is not None else 2 ** (codes.bits - 1) - 1
    each = (codes.scale.float() / top).repeat_interleave(group_size)
    return each[: torch.Size(codes.shape).numel()].view(codes.shape)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", [(64, 96), (7, 13), (3,), (5, 4, 6)])
def test_a_number_is_off_by_no_more_than_half_a_step(bits, symmetric, shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    codes = Codes.of(tensor, bits, 32, symmetric=symmetric)
    decoded = codes.decode()
    assert decoded.shape == tensor.shape
    assert decoded.is_contiguous()
    largest = tensor.abs().max() * 2**-8 if symmetric else 0  # the largest magnitude is rounded to bfloat16
    assert ((decoded - tensor).abs() <= 0.51 * step_of(codes, 32) + largest).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_group_of_one_sign_uses_all_codes(bits, sign):
    tensor = sign * torch.linspace(1, 2, 64)
    codes = Codes.of(tensor, bits, 64)
    assert len(set(codes.decode().tolist())) >= min(64, 2**bits - 1)
    assert (codes.decode() - tensor).abs().max() <= 1.02 / (2**bits - 1)


@pytest.mark.parametrize("value", [0.0, 0.3, -1e-6, 7e4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_constant_group_is_kept(value, symmetric):
    tensor = torch.full((2, 64), value)
    decoded = Codes.of(tensor, 4, 64, symmetric=symmetric).decode()
    assert torch.allclose(decoded, tensor, rtol=2**-8, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_not_finite_does_not_become_finite(bad, symmetric):
    tensor = torch.ones(128)
    tensor[70] = bad
    decoded = Codes.of(tensor, 8, 64, symmetric=symmetric).decode()
    assert not decoded[64:].isfinite().any()
    assert torch.allclose(decoded[:64], tensor[:64], rtol=2**-8)


def test_four_bits_take_half_the_bytes_and_scales_little():
    tensor = torch.randn(256, 64)
    assert Codes.of(tensor, 8, 256).stored_bytes == 256 * 64 * (1 + 4 / 256)
    assert Codes.of(tensor, 4, 128).stored_bytes == 256 * 64 * (0.5 + 4 / 128)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-6, 1e4), st.sampled_from([16, 64, 256]))
def test_symmetric_codes_survive_bfloat16(seed, size, group_size):
    generator = torch.Generator().manual_seed(seed)
    tensor = size * torch.randn(1024, generator=generator)
    codes, scale, numbers = at_random(tensor, 8, group_size, seed)
    again = Codes.of(numbers.bfloat16(), 8, group_size, symmetric=True)
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.scale, scale)


@pytest.mark.slow
def test_rounding_at_random_is_right_on_average_and_reproducible():
    tensor = torch.randn(256, generator=torch.Generator().manual_seed(3))

    def rounded(seed):
        return at_random(tensor, 4, 256, seed)[2]

    draws = torch.stack([rounded(seed) for seed in range(4000)])
    step = tensor.abs().max() / 7
    assert (draws.mean(0) - tensor).abs().max() < 5 * 0.5 * step / 4000**0.5
    assert torch.equal(rounded(5), rounded(5))
    assert not torch.equal(rounded(5), rounded(6))


def test_the_seam_of_a_scale_between_two_bfloat16_numbers_is_right_on_average():
    tensor = torch.tensor([1 + 2**-9, 0.5, 0.25, 0.125])
    draws = [at_random(tensor, 8, 4, seed)[2][0].item() for seed in range(2000)]
    assert len(set(draws)) == 2
    assert sum(draws) / 2000 == pytest.approx(1 + 2**-9, abs=5 * 2**-8 * 0.5 / 2000**0.5)


@pytest.mark.parametrize(("bits", "group_size"), [(3, 64), (16, 64), (8, 0), (8, 33), (8, 2.0)])
def test_what_cannot_be_kept_is_told(bits, group_size):
    with pytest.raises(ValueError, match=r"bits is|group_size is"):
        Codes.of(torch.ones(4), bits, group_size)
