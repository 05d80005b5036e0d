"""Residuals, moments and updates of fixed size walk the path of their papers' equations."""

import pytest
import torch

from galore_torch import GaLore, devices
from reference.beyond import Beyond
from tests.reference.problem import RANK, SHAPES, Problem, distance

GAP, LR = 20, 0.02
RESIDUALS = (None, "fira", "apollo", "alice", "sign", "full")
INSIDE = {
    "adamw": (
        {"optimizer_class": torch.optim.AdamW, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1},
        {"beta2": 0.99, "eps": 1e-4, "weight_decay": 0.1},
    ),
    "sgd": ({"optimizer_class": torch.optim.SGD, "momentum": 0.9, "nesterov": True}, {"beta2": None}),
}


def optimizer_of(weight: torch.Tensor, inside: str = "adamw", rank: int = RANK, **keys) -> GaLore:
    group = {"params": [weight], "rank": rank, "update_proj_gap": GAP, "scale": 0.5, "decomposition": "svd"}
    return GaLore([{**group, "stagger": False, **keys}], lr=LR, **INSIDE[inside][0])


def walk(problem: Problem, optimizer: GaLore) -> torch.Tensor:
    (weight,) = optimizer.param_groups[0]["params"]

    def step(gradient: torch.Tensor) -> None:
        weight.grad = gradient
        optimizer.step()

    return problem.walk(weight, step)


def expected_of(problem: Problem, inside: str = "adamw", rank: int = RANK, gap: int = GAP, **keys) -> torch.Tensor:
    weight = problem.start.clone()
    reference = Beyond(weight, rank, LR, gap, scale=0.5, **keys, **INSIDE[inside][1])
    walked = problem.walk(weight, reference.step)
    assert distance(problem.start, walked[-1]) > 0.1  # it has gone somewhere
    return walked


def problem_of(shape: str) -> tuple[Problem, torch.nn.Parameter]:
    problem = Problem.make(SHAPES[shape], torch.float64)
    return problem, torch.nn.Parameter(problem.start.clone())


@pytest.mark.parametrize("shape", ["tall", "wide"])
@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("normalize", [None, "columns", "orthogonal", "blocks"])
@pytest.mark.broad("columns-fira-sgd-wide", "None-full-adamw-tall", "None-sign-adamw-tall", "blocks-alice-adamw-tall")
def test_it_is_the_reference(shape, inside, residual, normalize):
    problem, weight = problem_of(shape)
    keys = {"residual": residual, "normalize": normalize, "residual_scale": 0.5, "moments": "rotate"}
    expected = expected_of(problem, inside, **keys)
    # Newton-Schulz makes what rounding leaves of a small singular value 485 times as large.
    least = 1e-10 if normalize in ("orthogonal", "blocks") else 1e-12
    assert distance(walk(problem, optimizer_of(weight, inside, **keys)), expected) <= least


@pytest.mark.parametrize("shape", ["tall", "wide"])
@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("moments", ["keep", "rotate"])
@pytest.mark.parametrize(("gap", "residual"), [(1, None), (5, "fira"), (1, "full")])
@pytest.mark.broad
def test_a_tracked_basis_is_the_reference(shape, inside, moments, gap, residual, monkeypatch):
    if (moments, inside) != ("rotate", "sgd"):  # where axes count: a GPU turns them to the singular directions, nearly
        monkeypatch.setattr(devices, "runs_ahead", lambda _: False)
    problem, weight = problem_of(shape)
    keys = {"residual": residual, "moments": moments}
    optimizer = optimizer_of(weight, inside, update_proj_gap=gap, **keys)  # an exact basis at first
    optimizer.register_step_post_hook(lambda *_: optimizer.param_groups[0].update(decomposition="tracked"))
    expected = expected_of(problem, inside, gap=gap, tracks=True, **keys)
    assert distance(walk(problem, optimizer), expected) <= 1e-8
