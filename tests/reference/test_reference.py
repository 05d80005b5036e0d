"""The reference is right by itself: it needs to be before anything is held to it."""

from itertools import pairwise

import pytest
import torch

from reference import galore
from reference.galore import GaLoreAdam, find_basis, project, project_back
from tests.reference.problem import PROJ_TYPES, RANK, SHAPES, Problem, distance


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_projecting_and_back_is_the_best_approximation_of_that_rank(shape, proj_type):
    gradient = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    best = left[:, :RANK] * values[:RANK] @ right[:RANK]
    bases = find_basis(gradient, RANK, proj_type)
    torch.testing.assert_close(project_back(project(gradient, *bases), *bases), best)


@pytest.mark.parametrize(
    ("shape", "proj_type", "coordinates"),
    [
        ("tall", "std", (48, 8)),
        ("wide", "std", (8, 48)),
        ("square", "std", (40, 8)),
        ("tall", "reverse_std", (8, 32)),
        ("wide", "reverse_std", (32, 8)),
        ("square", "reverse_std", (8, 40)),
        ("tall", "left", (8, 32)),
        ("wide", "right", (32, 8)),
        ("tall", "full", (8, 8)),
    ],
)
def test_each_proj_type_projects_its_sides(shape, proj_type, coordinates):
    gradient = torch.randn(SHAPES[shape], dtype=torch.float64)
    assert project(gradient, *find_basis(gradient, RANK, proj_type)).shape == coordinates


def test_without_a_basis_it_is_the_adamw_of_torch(monkeypatch):
    monkeypatch.setattr(galore, "find_basis", lambda *_: (None, None))
    problem = Problem.make(SHAPES["tall"], torch.float64)
    settings = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    ours = problem.start.clone()
    theirs = torch.nn.Parameter(problem.start.clone())
    adamw = torch.optim.AdamW([theirs], **settings)

    def step(gradient):
        theirs.grad = gradient
        adamw.step()

    walked = problem.walk(ours, GaLoreAdam(ours, RANK, scale=1.0, **settings).step)
    assert distance(walked, problem.walk(theirs, step)) < 1e-12


def test_the_basis_changes_at_the_gap_and_the_moments_are_kept(monkeypatch):
    renewed_at = []
    optimizer = GaLoreAdam(torch.zeros(6, 4), rank=2, lr=0.1, gap=3)
    monkeypatch.setattr(galore, "find_basis", lambda *a: (renewed_at.append(optimizer.t), find_basis(*a))[1])
    moments = []
    for _ in range(7):
        optimizer.step(torch.randn(6, 4))
        moments.append(optimizer.V.clone())
    assert renewed_at == [0, 3, 6]
    assert all((after >= 0.999 * before).all() for before, after in pairwise(moments))
