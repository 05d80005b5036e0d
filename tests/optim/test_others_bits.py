"""Embeddings, head and norms with moments in few bits, beside projected weights."""

import io
import sys

import pytest
import torch

from galore_torch import GaLoreAdamW, GaLoreMuon
from galore_torch.optim import state_bytes
from tests.optim.small import assert_same, gradient, refusing, walk, weights

optim = pytest.importorskip("torchao.optim")
every_recipe = pytest.mark.parametrize("recipe", [GaLoreAdamW, GaLoreMuon])
every_bits = pytest.mark.parametrize("bits", [8, 4])


def made(recipe, bits, trained):
    matrix, *others = trained
    groups = [{"params": [matrix], "rank": 4, "update_proj_gap": 3}, {"params": others, "lr": 0.02}]
    return recipe(groups, lr=0.01, weight_decay=0.1, others_bits=bits)


def drawn():
    """A matrix, embeddings and a norm."""
    return weights((64, 32), (128, 64), (64,))


@pytest.mark.slow
@every_recipe
@every_bits
def test_others_move_as_torchaos_adamw_does_and_matrices_as_ever(recipe, bits):
    trained, plain, alone = drawn(), drawn(), drawn()[1:]
    walk(made(recipe, bits, trained), trained, range(4))
    walk(made(recipe, None, plain), plain, range(4))
    theirs = {8: optim.AdamW8bit, 4: optim.AdamW4bit}[bits](alone, lr=0.02, weight_decay=0.1)
    for step in range(4):
        for index, weight in enumerate(alone, start=1):
            weight.grad = gradient(weight, step, index)
        theirs.step()
    assert_same(trained[1:], alone)
    assert_same(trained[0], plain[0])
    assert not torch.equal(trained[1], plain[1])


@pytest.mark.slow
@every_recipe
@every_bits
def test_their_state_takes_as_few_bits(recipe, bits):
    sizes = []
    for chosen in (None, bits):
        trained = drawn()
        optimizer = made(recipe, chosen, trained)
        walk(optimizer, trained, range(2))
        sizes.append(state_bytes(optimizer))
    numbers, block = 128 * 64, {8: 256, 4: 128}[bits]
    freed = 2 * numbers * (4 - bits / 8 - 4 / block)
    tables = 2 * 4 * 2**bits
    assert freed - tables - 64 <= sizes[0] - sizes[1] <= freed


@pytest.mark.slow
@every_recipe
@every_bits
def test_it_resumes_bit_for_bit(recipe, bits):
    trained, others = drawn(), drawn()
    optimizer = made(recipe, bits, trained)
    walk(optimizer, trained, range(4))
    resumed = made(recipe, bits, others)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for weight, other in zip(trained, others, strict=True):
            other.copy_(weight)
    for one, each in ((optimizer, trained), (resumed, others)):
        walk(one, each, range(4, 7))
    assert_same(*([[weight.detach() for weight in each] for each in (others, trained)]))


@every_recipe
@pytest.mark.parametrize("bits", [16, 2, True, "4"])
def test_other_bits_are_refused(recipe, bits):
    assert f"others_bits is {bits!r}" in refusing(lambda: made(recipe, bits, drawn()))


@every_recipe
def test_without_torchao_it_is_said_how_to_install_it(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r"others_bits=4 needs torchao.*\[torchao\]"):
        made(recipe, 4, drawn())


@every_bits
@pytest.mark.parametrize("given", [{"amsgrad": True}, {"correct_bias": False}, {"maximize": True}], ids=str)
def test_what_torchaos_does_not_serve_is_refused(bits, given):
    name, value = next(iter(given.items()))
    trained = drawn()
    groups = [{"params": trained[:1], "rank": 4}, {"params": trained[1:]}]
    said = refusing(lambda: GaLoreAdamW(groups, others_bits=bits, **given))
    assert f"{name}={value}" in said
    assert f"AdamW{bits}bit" in said
    assert "leave" in said
