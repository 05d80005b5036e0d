"""Residuals beside published implementations of them, from the same basis: pytorch_optimizer's and apollo-torch's."""

import importlib
import sys

import pytest
import pytorch_optimizer
import torch
from pytorch_optimizer.optimizer import racs

from benchmarks.common.peers import APOLLO
from galore_torch import GaLoreAdamW
from tests.reference.problem import RANK, SHAPES, Problem, distance

LR, BETAS, NEVER = 0.02, (0.9, 0.99), 10**6
SVD = torch.linalg.svd
NEGLIGIBLE_EPS = 1e-30
"""Added to other roots than torch's: none, no difference."""


def ours(weight: torch.Tensor, **keys) -> GaLoreAdamW:
    group = {"params": [weight], "rank": RANK, "update_proj_gap": NEVER, "decomposition": "svd", "stagger": False}
    return GaLoreAdamW([{**group, **keys}], lr=LR, betas=BETAS, eps=NEGLIGIBLE_EPS, correct_bias=False)


def walk(problem: Problem, weight: torch.Tensor, optimizer: torch.optim.Optimizer, rates=None) -> torch.Tensor:
    steps = iter(range(1, 1000))

    def step(gradient: torch.Tensor) -> None:
        weight.grad = gradient
        if rates is not None:
            optimizer.param_groups[0]["lr"] = rates(next(steps))
        optimizer.step()

    return problem.walk(weight, step)


def twins(shape: str, dtype: torch.dtype = torch.float64) -> tuple[Problem, torch.nn.Parameter, torch.nn.Parameter]:
    problem = Problem.make(SHAPES[shape], dtype)
    return problem, *(torch.nn.Parameter(problem.start.clone()) for _ in range(2))


@pytest.fixture(autouse=True)
def one_way_to_singular_vectors(monkeypatch):
    """On a GPU torch would take a method for theirs that is good to 1e-5 in float32, and another than ours."""
    monkeypatch.setattr(torch.linalg, "svd", by_qr)


def by_qr(matrix: torch.Tensor, full_matrices: bool = True, **_) -> tuple[torch.Tensor, ...]:
    return SVD(matrix, full_matrices, driver="gesvd" if matrix.is_cuda else None)


def with_bias_correction(step: int) -> float:
    return LR * (1 - BETAS[1] ** step) ** 0.5 / (1 - BETAS[0] ** step)


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_fira_is_that_of_pytorch_optimizer_without_a_scale(shape):
    problem, weight, other = twins(shape, torch.float32)  # in which theirs finds bases
    group = {"params": [other], "rank": RANK, "update_proj_gap": NEVER, "scale": 1.0, "projection_type": "std"}
    theirs = pytorch_optimizer.Fira([group], lr=LR, betas=BETAS, eps=NEGLIGIBLE_EPS)
    expected = walk(problem, other, theirs)
    assert distance(problem.start, expected[-1]) > 0.1
    found = walk(problem, weight, ours(weight, residual="fira", scale=1.0), with_bias_correction)
    assert distance(found, expected) <= 1e-5


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_alice_is_that_of_pytorch_optimizer_in_the_leading_subspace(shape, monkeypatch):
    monkeypatch.setattr(racs.Alice, "switch", lambda _, q, *given: torch.linalg.eigh(q).eigenvectors[:, -RANK:])
    problem, weight, other = twins(shape)
    choices = {"alpha": 0.3, "alpha_c": 0.4, "rank": RANK, "leading_basis": RANK, "update_interval": NEVER}
    theirs = racs.Alice([other], lr=LR, betas=(*BETAS, 0.999), eps=NEGLIGIBLE_EPS, gamma=1.01, **choices)
    expected = walk(problem, other, theirs)
    assert distance(problem.start, expected[-1]) > 0.1
    found = walk(problem, weight, ours(weight, residual="alice", scale=0.3, residual_scale=0.4, proj_type="left"))
    assert distance(found, expected) <= 1e-6


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_apollo_is_that_of_apollo_torch(shape, monkeypatch):
    monkeypatch.syspath_prepend(APOLLO.folder)
    assert APOLLO.folder.is_dir(), "run `make setup`"
    apollo_torch = importlib.import_module("apollo_torch")
    problem, weight, other = twins(shape, torch.float32)
    group = {
        "params": [other],
        "rank": RANK,
        "update_proj_gap": NEVER,
        "scale": 0.25,
        "proj": "svd",
        "proj_type": "std",
    }
    theirs = apollo_torch.APOLLOAdamW(
        [{**group, "scale_type": "channel"}], lr=LR, betas=BETAS, eps=NEGLIGIBLE_EPS, correct_bias=False
    )
    expected = walk(problem, other, theirs)
    assert distance(problem.start, expected[-1]) > 0.1
    assert distance(walk(problem, weight, ours(weight, residual="apollo", scale=0.5)), expected) <= 1e-5
    for name in [name for name in sys.modules if name.partition(".")[0] == "apollo_torch"]:
        del sys.modules[name]
