"""Which subspace: each decomposition against the exact one, and what all of them promise of a basis."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from galore_torch import devices
from galore_torch.projection import DECOMPOSITIONS, Projection, find_bases, find_basis, sketch
from galore_torch.projection.orthonormal import exact_svd
from tests.projection.bases import energy, orthonormal, with_spectrum

NAMES = tuple(DECOMPOSITIONS)
ITERATIVE = ("randomized", "warm")
SHAPES = {"tall": (96, 40), "wide": (40, 96), "square": (64, 64)}
SIDES = [("left",), ("right",), ("left", "right")]
SPECTRA = {
    "exponential": lambda k: 0.8**k,
    "linear decay": lambda k: 1 / (1 + k),
    "slow decay": lambda k: (1 + k) ** -0.5,
    "steps": lambda k: 10.0 ** -(k // 6),
}


def found(matrix, rank, decomposition, sides=("left",), seed=0, old=None):
    return find_bases(matrix, dict.fromkeys(sides, rank), decomposition, seed=seed, old=old)


def exact(matrix, rank):
    left, _, right = exact_svd(matrix)
    return {"left": left[..., :rank], "right": right.mT[..., :rank]}


def assert_orthonormal(basis, tolerance=1e-5):
    gram = basis.mT @ basis
    assert (gram - torch.eye(basis.shape[-1], dtype=basis.dtype)).abs().max() < tolerance


@pytest.mark.parametrize("sides", SIDES, ids="-".join)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("decomposition", NAMES)
@pytest.mark.broad
def test_a_basis_is_orthonormal_and_holds_its_own_elements_alone(decomposition, shape, sides):
    bases = found(torch.randn(shape), 6, decomposition, sides)
    assert set(bases) == set(sides)
    for side, basis in bases.items():
        assert basis.shape == (shape[side == "right"], 6)
        assert_orthonormal(basis)
        assert basis.is_contiguous()
        assert basis.untyped_storage().nbytes() == 6 * basis.shape[0] * 4


@pytest.mark.parametrize("sides", SIDES, ids="-".join)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_svd_keeps_the_signs_of_the_devices_library_whatever_the_old_basis(shape, sides):
    matrix = torch.randn(shape)
    expected = exact(matrix, 8)
    bases = found(matrix, 8, "svd", sides, old={side: -expected[side] for side in sides})
    assert all(torch.equal(bases[side], expected[side]) for side in sides)


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())
@pytest.mark.parametrize("sides", SIDES, ids="-".join)
@pytest.mark.parametrize("shape", [(320, 128), (128, 320)], ids=["tall", "wide"])
@pytest.mark.parametrize("decomposition", ITERATIVE)
@pytest.mark.broad
def test_an_iteration_captures_what_the_exact_basis_captures(decomposition, shape, sides, spectrum):
    """From nothing, and (warm) from the basis of a gradient that has moved since."""
    matrix = with_spectrum(*shape, spectrum(torch.arange(128.0, dtype=torch.float64)))
    before = matrix + 0.5 * matrix.norm() / matrix.numel() ** 0.5 * torch.randn_like(matrix)
    for old in (None, exact(before, 24)):
        basis = found(matrix.float(), 24, decomposition, sides, old=old)
        best = energy(matrix, {side: exact(matrix, 24)[side] for side in sides})
        assert 0.99 * best <= energy(matrix, basis) <= best * (1 + 1e-5)


def test_randomized_takes_no_notice_of_the_old_subspace():
    matrix = torch.randn(60, 40)
    first = found(matrix, 5, "randomized")
    again = found(matrix, 5, "randomized", old={"left": orthonormal(60, 5)})
    torch.testing.assert_close(again["left"].abs(), first["left"].abs())  # signs follow the old one


def test_warm_starts_from_the_old_basis():
    """Where 80 directions are equally strong, one iteration from a random start cannot hold the old 24 of them."""
    values = torch.cat((torch.ones(80), torch.full((48,), 0.1))).double()
    matrix = with_spectrum(200, 128, values)
    old = exact(matrix, 24)["left"]
    overlap = {
        name: float((found(matrix, 24, "warm", old=known)["left"].mT @ old).square().sum()) / 24
        for name, known in {"from the old": {"left": old}, "from nothing": None}.items()
    }
    assert overlap["from the old"] > 0.75
    assert overlap["from nothing"] < 0.5


def test_warm_follows_a_subspace_that_turns():
    """A renewal each time the leading subspace has turned by some 0.3 rad, ten times over."""
    left, right = orthonormal(96, 64), orthonormal(64, 64)
    values = 1 / (1 + torch.arange(64, dtype=torch.float64))
    basis, worst = None, 1.0
    for _ in range(10):
        skew = torch.randn(96, 96, dtype=torch.float64)
        left = torch.linalg.matrix_exp(0.03 * (skew - skew.T) / 2**0.5) @ left
        matrix = left * values @ right.mT
        basis = found(matrix, 8, "warm", old=basis)
        worst = min(worst, energy(matrix, basis) / float(values[:8].square().sum()))
    assert worst >= 0.99


@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
def test_the_sketch_of_an_average_finds_the_basis_of_the_average(proj_type):
    projection, parts = Projection.of((3, 60, 40), 5, proj_type=proj_type, layout="stack"), torch.randn(4, 3, 60, 40)
    old = find_basis(projection, torch.randn(3, 60, 40), "sketched", seed=1)
    for known in (None, old):
        whole = find_basis(projection, parts.double().mean(0), "sketched", seed=7, old=known)
        sketched = torch.stack([sketch(projection, one, seed=7) for one in parts.double()]).mean(0)
        for name, factor in find_basis(projection, sketched, "sketched", seed=7, old=known).items():
            torch.testing.assert_close(factor, whole[name], atol=1e-10, rtol=0)


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())
def test_a_sketch_finds_most_of_what_the_exact_basis_captures(spectrum):
    matrix = with_spectrum(320, 128, spectrum(torch.arange(128.0, dtype=torch.float64)))
    basis = found(matrix, 24, "sketched", ("right",))
    assert energy(matrix, basis) >= 0.8 * energy(matrix, {"right": exact(matrix, 24)["right"]})


def test_a_random_basis_is_seeded_and_blind_to_the_gradient():
    one, other = torch.randn(2, 30, 20)
    basis = found(one, 4, "random")["left"]
    assert torch.equal(found(other, 4, "random")["left"], basis)
    assert not torch.allclose(found(one, 4, "random", seed=1)["left"].abs(), basis.abs(), atol=0.1)


@pytest.mark.parametrize("decomposition", ITERATIVE)
def test_the_same_seed_draws_the_same_basis(decomposition):
    matrix = torch.randn(64, 64)
    basis = found(matrix, 4, decomposition)["left"]
    assert torch.equal(found(matrix, 4, decomposition)["left"], basis)
    assert not torch.equal(found(matrix, 4, decomposition, seed=1)["left"], basis)


@pytest.mark.parametrize("decomposition", ["randomized", "warm", "random"])
@pytest.mark.parametrize("sides", SIDES, ids="-".join)
def test_signs_turn_to_agree_with_the_old_basis(decomposition, sides):
    matrix = with_spectrum(40, 30, 0.3 ** torch.arange(30.0, dtype=torch.float64))
    first = found(matrix, 5, decomposition, sides)
    flips = torch.tensor([1.0, -1, -1, 1, -1], dtype=torch.float64)
    old = {side: basis * flips for side, basis in first.items()}
    again = found(matrix, 5, decomposition, sides, old=old)
    for side in sides:
        torch.testing.assert_close(again[side], old[side], atol=1e-8, rtol=0)  # iterations go on converging


@pytest.mark.parametrize("sides", SIDES, ids="-".join)
@pytest.mark.parametrize("decomposition", ["svd", *ITERATIVE])
def test_a_rank_deficient_matrix_is_captured_whole(decomposition, sides):
    matrix = torch.randn(50, 2) @ torch.randn(2, 30)
    for old in (None, exact(torch.randn(50, 30), 6)):
        bases = found(matrix, 6, decomposition, sides, old=old)
        for basis in bases.values():
            assert_orthonormal(basis if old else basis[:, :2])
            assert old or not basis[:, 2:].any()
        assert energy(matrix, bases) >= 0.99999 * float(matrix.double().square().sum())


@pytest.mark.parametrize("factor", [1e-20, 1e20])
@pytest.mark.parametrize("sides", SIDES, ids="-".join)
@pytest.mark.parametrize("decomposition", ["svd", *ITERATIVE])
def test_tiny_and_huge_matrices_have_the_basis_of_ordinary_ones(decomposition, sides, factor):
    matrix = with_spectrum(40, 30, 0.7 ** torch.arange(30.0, dtype=torch.float64)).float()
    ordinary, scaled = found(matrix, 5, decomposition, sides), found(matrix * factor, 5, decomposition, sides)
    for side in sides:
        assert_orthonormal(scaled[side])
        torch.testing.assert_close(scaled[side].abs(), ordinary[side].abs(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sides", SIDES, ids="-".join)
@pytest.mark.parametrize("decomposition", ["svd", *ITERATIVE])
def test_a_stack_is_done_as_one_by_one(decomposition, sides):
    """With a spectrum that falls so fast that every iteration has converged, whatever it drew."""
    values = 0.3 ** torch.arange(12.0, dtype=torch.float64)
    stack = torch.stack([with_spectrum(20, 12, values) * scale for scale in (1, 1e-12, 1e6, 1)]).unflatten(0, (2, 2))
    old = {side: torch.stack([exact(one, 4)[side] for one in stack.flatten(0, 1)]) for side in sides}
    together = found(stack, 4, decomposition, sides, old={s: basis.unflatten(0, (2, 2)) for s, basis in old.items()})
    for index, matrix in enumerate(stack.flatten(0, 1)):
        alone = found(matrix, 4, decomposition, sides, old={side: basis[index] for side, basis in old.items()})
        for side in sides:
            assert together[side].is_contiguous()
            torch.testing.assert_close(together[side].flatten(0, 1)[index], alone[side], atol=1e-6, rtol=0)


@pytest.mark.parametrize("decomposition", NAMES)
def test_a_matrix_of_zeros_in_a_stack_keeps_its_old_basis(decomposition):
    stack = torch.randn(3, 20, 12)
    old = found(stack, 4, decomposition)
    moved = torch.stack((torch.randn(20, 12), torch.zeros(20, 12), torch.randn(20, 12)))
    kept = (found(moved, 4, decomposition, seed=1, old=old)["left"] == old["left"]).flatten(1).all(1)
    assert kept.tolist() == [False, True, False]
    first, idle, last = found(moved, 4, decomposition)["left"]  # and without an old one has none yet
    assert bool(idle.any()) == (decomposition == "random")
    assert_orthonormal(first)
    assert_orthonormal(last)


@pytest.mark.parametrize("decomposition", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_basis_has_the_dtype_of_the_gradient_and_is_computed_in_float32_at_least(decomposition, dtype, monkeypatch):
    monkeypatch.setattr(devices, "cpu_multiplies_bfloat16", lambda: True)
    projection = Projection.of((24, 16), 4)
    grad = with_spectrum(24, 16, 0.6 ** torch.arange(16.0, dtype=torch.float64)).to(dtype)
    basis = find_basis(projection, grad, decomposition, seed=0)["right"]
    assert basis.dtype == dtype
    precise = grad if dtype == torch.float64 else grad.float()
    expected = found(precise, 4, decomposition, ("right",))["right"].to(dtype)
    if dtype == torch.bfloat16 and decomposition in (
        "randomized",
        "warm",
        "tracked",
        "switched",
    ):  # multiplied in bf16 itself
        overlap = (basis.float().mT @ expected.float()).square().sum() / 4
        assert overlap > 0.999
    else:
        assert torch.equal(basis, expected)


class Products(TorchDispatchMode):
    """The dtypes of the products with a matrix of a shape, or with its transpose."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.dtypes = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default and args[0].shape in (self.shape, self.shape[::-1]):
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("decomposition", ["randomized", "warm", "switched", "sampled", "sketched"])
def test_a_matrix_on_which_lapack_gives_up_in_float32_has_a_basis(decomposition, monkeypatch):
    """As on one with six entries that are not zero, with torch 2.13's library."""
    eigh = torch.linalg.eigh

    def fails_in_float32(symmetric):
        if symmetric.dtype is torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(symmetric)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    matrix = torch.zeros(64, 64)
    matrix[[8, 18, 26, 31, 58, 60], [48, 54, 29, 53, 46, 62]] = 1
    bases = found(matrix, 16, decomposition)
    assert bases["left"].dtype is torch.float32
    assert energy(matrix, bases) > 5.99


@pytest.mark.parametrize(("decomposition", "products"), [("svd", 0), ("random", 0), ("tracked", 2), ("warm", 4)])
def test_a_matrix_is_multiplied_twice_an_iteration_and_not_once_more(decomposition, products):
    """Which directions it determines is told by what is at hand."""
    matrix = torch.randn(40, 96)
    with Products(matrix.shape) as seen:
        find_bases(matrix, {"left": 8}, decomposition, seed=1, old=exact(matrix, 8), old_is_whole=True)
    assert len(seen.dtypes) == products


@pytest.mark.parametrize("is_fast", [True, False])
def test_bfloat16_is_multiplied_as_it_is_only_where_there_are_instructions_for_it(is_fast, monkeypatch):
    monkeypatch.setattr(devices, "cpu_multiplies_bfloat16", lambda: is_fast)
    matrix = torch.randn(40, 96, dtype=torch.bfloat16)
    with Products(matrix.shape) as seen:
        found(matrix, 8, "warm")
    assert set(seen.dtypes) == {torch.bfloat16 if is_fast else torch.float32}


@pytest.mark.parametrize("shape", [(1, 30), (30, 1), (1, 1), (5, 5)])
@pytest.mark.parametrize("decomposition", NAMES)
def test_the_smallest_matrices_have_bases(decomposition, shape):
    rank = min(shape)
    bases = found(torch.randn(shape), rank, decomposition, ("left", "right"))
    for basis in bases.values():
        assert_orthonormal(basis)
        assert basis.shape[-1] == rank


def test_an_unknown_decomposition_is_refused_by_name():
    with pytest.raises(
        ValueError, match="decomposition is 'qr'; use one of svd, randomized, warm, tracked, random, switched, sampled"
    ):
        found(torch.randn(4, 4), 2, "qr")


def test_a_switched_basis_leads_with_half_and_fills_up_from_the_complement():
    matrix = with_spectrum(60, 40, 0.5 ** torch.arange(40.0, dtype=torch.float64))
    basis = found(matrix, 8, "switched")["left"]
    leading = exact(matrix, 4)["left"]
    assert (leading.mT @ basis[:, :4]).square().sum() > 3.99
    assert (leading.mT @ basis[:, 4:]).square().sum() < 0.01
    other = found(matrix, 8, "switched", seed=1, old={"left": basis})["left"]
    assert (basis[:, 4:].mT @ other[:, 4:]).square().sum() < 2  # of 4, where they were the same


def test_sampled_bases_hold_leading_vectors_more_often_but_not_always():
    values = torch.cat((torch.full((4,), 3.0), torch.full((12,), 1.0)))
    matrix = with_spectrum(24, 16, values.double())
    leading = exact(matrix, 4)["left"]
    held = [float((leading.mT @ found(matrix, 4, "sampled", seed=seed)["left"]).square().sum()) for seed in range(200)]
    assert 1.6 < sum(held) / 200 < 2.3  # 2 of the first of 4 draws, and fewer of those that follow
    assert len({round(one) for one in held}) > 2
