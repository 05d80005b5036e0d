import io

import pytest
import torch

from galore_torch.lowbit import Storage, StoredBasis, is_same_basis, orthonormality_loss

SHAPES = {"left": (96, 24), "right": (160, 24)}


def basis(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.linalg.qr(torch.randn(shape, generator=generator)).Q.to(dtype) for name, shape in SHAPES.items()
    }


def test_sixteen_bits_are_the_factors_themselves():
    plain = basis()
    stored = Storage().store(plain)
    assert all(stored[name] is plain[name] for name in plain)
    assert Storage().read(stored, SHAPES, torch.float32) is stored


# Errors of s / sqrt(d) an entry make a loss of about 2 s sqrt(2 r / d): s is half a step over sqrt(3).
@pytest.mark.parametrize(("bits", "at_most"), [(8, 0.02), (4, 0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_bits_lose_little_of_orthonormality(bits, at_most, dtype):
    storage = Storage(bits=bits)
    read = storage.read(storage.store(basis(dtype=dtype)), SHAPES, dtype)
    for name, shape in SHAPES.items():
        assert read[name].shape == shape
        assert read[name].dtype == dtype
        assert orthonormality_loss(read[name]) <= at_most
    assert orthonormality_loss(basis()["left"]) < 1e-5


def test_a_first_singular_vector_of_one_sign_is_kept_as_well_as_others():
    positive = torch.linspace(0.5, 1.5, 256).unsqueeze(1)
    positive /= positive.norm()
    storage = Storage(bits=4)
    read = storage.read(storage.store({"left": positive}), {"left": (256, 1)}, torch.float32)
    assert (read["left"] - positive).abs().max() <= 0.51 * (positive.max() - positive.min()) / 15 * 1.02


def test_what_is_stored_is_plain_tensors_of_few_bytes():
    stored = Storage(bits=4, group_size=128).store(basis())
    count = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    tensors = [tensor for packed in stored.values() for tensor in packed.values()]
    assert all(type(tensor) is torch.Tensor for tensor in tensors)
    assert sum(tensor.nbytes for tensor in tensors) <= count * 0.5 * 1.07


def test_the_same_basis_is_known_without_decoding():
    storage = Storage(bits=8)
    stored = storage.store(basis())
    one, two = (storage.read(stored, SHAPES, torch.float32) for _ in range(2))
    other = storage.read(storage.store(basis(seed=1)), SHAPES, torch.float32)
    assert is_same_basis(one, two)
    assert not is_same_basis(one, other)
    assert is_same_basis(basis(), basis())
    assert not is_same_basis(basis(), basis(seed=1))


def test_a_stored_basis_survives_a_file():
    storage = Storage(bits=4)
    read = storage.read(storage.store(basis()), SHAPES, torch.float32)
    file = io.BytesIO()
    torch.save(read, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert isinstance(again, StoredBasis)
    assert is_same_basis(read, again)
    assert torch.equal(read["left"], again["left"])
