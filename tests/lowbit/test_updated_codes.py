"""An update of a weight in INT8, compiled and plain."""

import warnings

import pytest
import torch

from galore_torch.lowbit import QuantizedWeight, updated_codes
from galore_torch.lowbit.codes import symmetric_codes, symmetric_numbers


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same_codes(one, other):
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale, other.scale)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [5, None])
@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (30, 7)])
def test_a_compiled_update_is_the_plain_one(monkeypatch, rows, columns, seed):
    """Or is refused with a warning: of this function torch's compiler makes one with other numbers for AVX2."""
    monkeypatch.setattr(updated_codes, "_compiled", [])

    def moved(compiled_from):
        monkeypatch.setattr(updated_codes, "COMPILED_ELEMENTS", compiled_from)
        kept = QuantizedWeight.of(numbers(rows, columns), 32, seed=seed)
        for step in range(1, 4):
            update = numbers(rows, columns, seed=step).bfloat16()
            kept.move(lambda part, update=update: update[part], step=step, alpha=-0.01, beta=0.99)
        return kept

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        compiled = moved(1)
    assert_same_codes(compiled, moved(10**9))
    refused = updated_codes._compiled == [updated_codes.updated_codes]
    assert refused is any("(ArithmeticError" in str(one.message) for one in told)
    assert torch.backends.cpu.get_cpu_capability() != "AVX512" or not refused


def rounded_otherwise(codes, scale, update, alpha, beta, key, first):
    """The update with numbers that are off by their last bit, as where a product and a sum are one operation."""
    exact = symmetric_numbers(codes, scale, bits=8) * beta + update.float() * alpha
    return symmetric_codes(exact * (1 + 2**-23), 8, key, first)


def of_another_draw(codes, scale, update, alpha, beta, key, first):
    """The update with other random numbers: nearly every group has other codes, each by a step."""
    return updated_codes.updated_codes(codes, scale, update, alpha, beta, key, first + 1)


def far_off(*given):
    """The update with a single number of a thousand groups far off."""
    codes, scale = updated_codes.updated_codes(*given)
    codes[7, 3] ^= 64
    return codes, scale


@pytest.mark.parametrize(
    ("compiled", "is_taken"), [(rounded_otherwise, True), (of_another_draw, False), (far_off, False)]
)
def test_a_compiled_update_may_round_otherwise_and_nothing_else(monkeypatch, compiled, is_taken):
    monkeypatch.setattr(updated_codes, "_compiled", [])
    monkeypatch.setattr(torch, "compile", lambda *_, **__: compiled)
    kept = QuantizedWeight.of(numbers(1024, 256), 256, seed=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        kept.move(lambda rows: numbers(1024, 256, seed=2)[rows], step=1, alpha=-0.01, beta=0.99)
    monkeypatch.setattr(updated_codes, "COMPILED_ELEMENTS", 10**9)
    plain = QuantizedWeight.of(numbers(1024, 256), 256, seed=1)
    plain.move(lambda rows: numbers(1024, 256, seed=2)[rows], step=1, alpha=-0.01, beta=0.99)
    assert torch.equal(kept.codes, plain.codes) is not is_taken  # those of what is refused are the plain one's
    assert any("ArithmeticError" in str(one.message) for one in told) is not is_taken
    assert (updated_codes._compiled == [updated_codes.updated_codes]) is not is_taken


def test_what_cannot_be_compiled_is_told_once_and_made_in_plain_torch(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(updated_codes, "_compiled", [])
    monkeypatch.setattr(updated_codes, "COMPILED_ELEMENTS", 1)
    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    kept, plain = QuantizedWeight.of(numbers(8, 32), 32, seed=1), QuantizedWeight.of(numbers(8, 32), 32, seed=1)
    with pytest.warns(UserWarning, match=r"could not be compiled \(RuntimeError: no compiler\).*C\+\+ compiler"):
        kept.move(lambda rows: numbers(8, 32, seed=2)[rows], step=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="updates of INT8")
        kept.move(lambda rows: numbers(8, 32, seed=3)[rows], step=2)
    monkeypatch.setattr(updated_codes, "COMPILED_ELEMENTS", 10**9)
    for step in (1, 2):
        plain.move(lambda rows, step=step: numbers(8, 32, seed=1 + step)[rows], step=step)
    assert_same_codes(kept, plain)
