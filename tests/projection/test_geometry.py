"""`project`, `project_back` and `fold` against the formulas, written out."""

import re

import pytest
import torch

from galore_torch.projection import Projection, find_basis
from tests.projection.bases import orthonormal, random_basis

SHAPES = {"tall": (12, 7), "wide": (7, 12), "square": (9, 9)}
RANK = 3
SIDES = {
    ("tall", "std"): "right",
    ("wide", "std"): "left",
    ("square", "std"): "right",
    ("tall", "reverse_std"): "left",
    ("wide", "reverse_std"): "right",
    ("square", "reverse_std"): "left",
    **{(shape, side): side for shape in SHAPES for side in ("left", "right")},
    **{(shape, "full"): "left right" for shape in SHAPES},
}
MATRICES = [pytest.param(SHAPES[shape], proj_type, SIDES[shape, proj_type], id=f"{shape}-{proj_type}")
            for shape, proj_type in SIDES]  # fmt: skip

# The formulas of GaLore (equation 2, definition 3.6), for matrices and stacks of them: G is mn, P is mr, Q is ns.
PROJECT = {"left": "...mr,...mn->...rn", "right": "...mn,...ns->...ms", "left right": "...mr,...mn,...ns->...rs"}
PROJECT_BACK = {"left": "...mr,...rn->...mn", "right": "...ms,...ns->...mn", "left right": "...mr,...rs,...ns->...mn"}


def formula(formulas, sides, tensor, basis):
    operands = {"left": (basis.get("left"), tensor), "right": (tensor, basis.get("right"))}
    both = (basis.get("left"), tensor, basis.get("right"))
    return torch.einsum(formulas[sides], *operands.get(sides, both))


@pytest.mark.parametrize(("shape", "proj_type", "sides"), MATRICES)
def test_a_matrix_follows_the_formulas(shape, proj_type, sides):
    projection = Projection.of(shape, RANK, proj_type)
    basis = random_basis(projection)
    assert " ".join(basis) == sides
    gradient = torch.randn(shape, dtype=torch.float64)
    projected = projection.project(gradient, basis)
    torch.testing.assert_close(projected, formula(PROJECT, sides, gradient, basis))
    assert projected.shape == projection.projected_shape
    assert projected.is_contiguous()
    back = projection.project_back(projected, basis)
    torch.testing.assert_close(back, formula(PROJECT_BACK, sides, projected, basis))


@pytest.mark.parametrize(("shape", "proj_type", "sides"), MATRICES)
def test_fold_adds_to_the_weight_in_place(shape, proj_type, sides):
    projection = Projection.of(shape, RANK, proj_type)
    basis = random_basis(projection)
    start = torch.randn(shape, dtype=torch.float64)
    coordinates = torch.randn(projection.projected_shape, dtype=torch.float64)
    expected = 0.75 * start - 0.3 * formula(PROJECT_BACK, sides, coordinates, basis)
    for weight in (start.clone(), start.mT.clone().mT):  # of any layout in memory
        untouched = coordinates.clone()
        projection.fold(weight, coordinates, basis, alpha=-0.3, beta=0.75)
        torch.testing.assert_close(weight, expected)
        assert torch.equal(coordinates, untouched)


def test_fold_takes_coordinates_of_another_dtype():
    projection = Projection.of((16, 8), 2)
    basis = {"right": orthonormal(8, 2).bfloat16()}
    weight, coordinates = torch.ones(16, 8, dtype=torch.bfloat16), torch.randn(16, 2)
    projection.fold(weight, coordinates, basis, alpha=1.0)
    expected = 1 + coordinates @ basis["right"].float().T
    torch.testing.assert_close(weight.float(), expected, atol=0.03, rtol=0.01)  # of bfloat16, around 1 to 4


def test_reverse_std_of_a_wide_matrix_at_its_full_rank():
    gradient = torch.randn(64, 256, dtype=torch.float64)
    projection = Projection.of((64, 256), 64, "reverse_std")
    basis = find_basis(projection, gradient, "svd", seed=0)
    assert projection.projected_shape == (64, 64)
    assert basis["right"].shape == (256, 64)
    torch.testing.assert_close(projection.project_back(projection.project(gradient, basis), basis), gradient)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("rank", [9, 100])
def test_a_rank_of_the_shorter_side_or_more_is_cut_and_saves_nothing(shape, rank):
    projection = Projection.of(shape, rank)
    assert [mode.rank for mode in projection.modes] == [min(shape)]
    assert projection.saves_nothing
    gradient = torch.randn(shape, dtype=torch.float64)
    basis = random_basis(projection)
    torch.testing.assert_close(projection.project_back(projection.project(gradient, basis), basis), gradient)


@pytest.mark.parametrize(
    ("shape", "rank", "proj_type", "saves_nothing"),
    [
        ((100, 100), 66, "std", False),  # 66 (100 + 2 * 100) < 2 * 100 * 100
        ((100, 100), 67, "std", True),
        ((100, 100), 61, "full", False),  # 61 (100 + 100 + 2 * 61) < 2 * 100 * 100
        ((100, 100), 62, "full", True),
        ((8, 8, 3, 3), 8, "std", True),  # no axis is longer than the rank
        ((8, 8, 3, 3), 4, "std", False),
    ],
)
def test_a_rank_saves_nothing_where_basis_and_moments_are_as_large_as_plain_ones(shape, rank, proj_type, saves_nothing):
    assert Projection.of(shape, rank, proj_type).saves_nothing is saves_nothing


@pytest.mark.parametrize("leading", [(4,), (2, 3)])
@pytest.mark.parametrize(("shape", "proj_type", "sides"), MATRICES)
@pytest.mark.broad
def test_a_stack_has_a_basis_for_each_matrix(leading, shape, proj_type, sides):
    projection = Projection.of((*leading, *shape), RANK, proj_type, "stack")
    one = Projection.of(shape, RANK, proj_type)
    assert projection.projected_shape == (*leading, *one.projected_shape)
    assert projection.factor_shapes == {side: (*leading, *factor) for side, factor in one.factor_shapes.items()}
    basis = random_basis(projection)
    gradient, weight = torch.randn(2, *projection.shape, dtype=torch.float64)
    projected = projection.project(gradient, basis)
    torch.testing.assert_close(projected, formula(PROJECT, sides, gradient, basis))
    back = projection.project_back(projected, basis)
    torch.testing.assert_close(back, formula(PROJECT_BACK, sides, projected, basis))
    expected = 0.5 * weight + 2 * back
    last_two_swapped = weight.mT.clone().mT
    for folded in (weight, last_two_swapped):
        projection.fold(folded, projected, basis, alpha=2.0, beta=0.5)
        torch.testing.assert_close(folded, expected)


def test_reshape_projects_all_axes_but_the_first_as_one():
    projection = Projection.of((6, 4, 3, 3), 2, layout="reshape")
    flat = Projection.of((6, 36), 2)
    basis = random_basis(flat)
    gradient, weight = torch.randn(2, 6, 4, 3, 3, dtype=torch.float64)
    projected = projection.project(gradient, basis)
    torch.testing.assert_close(projected, basis["left"].T @ gradient.flatten(1))
    back = (basis["left"] @ projected).reshape(gradient.shape)
    torch.testing.assert_close(projection.project_back(projected, basis), back)
    expected = 0.5 * weight + back
    projection.fold(weight, projected, basis, alpha=1.0, beta=0.5)
    torch.testing.assert_close(weight, expected)


def test_a_convolution_in_tucker_form_has_a_factor_for_each_long_axis():
    projection = Projection.of((12, 8, 3, 5), 4)
    assert projection.factor_shapes == {"mode0": (12, 4), "mode1": (8, 4), "mode3": (5, 4)}
    assert projection.projected_shape == (4, 4, 3, 4)
    basis = random_basis(projection)
    factors = basis.values()
    gradient, weight = torch.randn(2, 12, 8, 3, 5, dtype=torch.float64)
    projected = projection.project(gradient, basis)
    torch.testing.assert_close(projected, torch.einsum("oikl,oa,ib,lc->abkc", gradient, *factors))
    assert projected.is_contiguous()
    back = torch.einsum("abkc,oa,ib,lc->oikl", projected, *factors)
    torch.testing.assert_close(projection.project_back(projected, basis), back)
    expected = 0.5 * weight - back
    projection.fold(weight, projected, basis, alpha=-1.0, beta=0.5)
    torch.testing.assert_close(weight, expected)


def test_a_projected_tensor_is_contiguous_when_the_first_axis_alone_is_projected():
    projection = Projection.of((12, 3, 4), 6)
    projected = projection.project(torch.randn(12, 3, 4, dtype=torch.float64), random_basis(projection))
    assert projected.shape == (6, 3, 4)
    assert projected.is_contiguous()


def test_the_identity_projects_nothing():
    identity = Projection.identity((5,))
    gradient, weight = torch.randn(2, 5)
    assert torch.equal(identity.project(gradient, {}), gradient)
    expected = 0.5 * weight + 2 * gradient
    identity.fold(weight, gradient, {}, alpha=2.0, beta=0.5)
    torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((8, 4), 0), "rank is 0"),
        (((8, 4), -2), "rank is -2"),
        (((8, 4), 2.5), "rank is 2.5"),
        (((8, 4), True), "rank is True"),
        (((8, 4), 2, "both"), "proj_type is 'both'; use one of std, reverse_std, left, right, full"),
        (((8, 4), 2, "std", "flat"), "layout is 'flat'; use one of tucker, stack, reshape"),
        (((32,), 2), "of shape (32,) cannot be projected"),
        (((0, 4), 2), "of shape (0, 4) has no elements"),
        (((8, 4, 4), 2, "left"), "proj_type is 'left' for a parameter of shape (8, 4, 4)"),
    ],
)
def test_what_cannot_be_projected_is_refused_by_value(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Projection.of(*arguments)
