"""The package walks the path of the paper's algorithm, and so does galore-torch 1.0 where the three mean the same."""

import importlib.util
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.common.peers import GALORE_1, installed
from galore_torch import GaLoreAdamW
from reference import galore
from reference.galore import GaLoreAdam
from tests.reference.problem import GAP, LR, PROJ_TYPES, RANK, SCALE, SHAPES, Problem, distance

NEGLIGIBLE_EPS = 1e-20
"""galore-torch 1.0 adds eps before the bias correction of the second moment and torch after: no eps, no difference."""


@pytest.fixture(autouse=True)
def svd_by_the_qr_method(monkeypatch, device):
    """On a GPU torch's default method gives singular vectors other signs, which moments in a new basis follow."""
    if device != "cpu":
        method = partial(torch.linalg.svd, driver="gesvd")
        monkeypatch.setattr(galore, "linalg", SimpleNamespace(svd=method))


every_shape = pytest.mark.parametrize("shape", SHAPES)
every_proj_type = pytest.mark.parametrize("proj_type", PROJ_TYPES)


def walk_ours(problem: Problem, proj_type: str, **adamw_arguments) -> torch.Tensor:
    weight = torch.nn.Parameter(problem.start.clone())
    group = {
        "params": [weight],
        "rank": RANK,
        "update_proj_gap": GAP,
        "scale": SCALE,
        "proj_type": proj_type,
        "decomposition": "svd",
        "stagger": False,
    }
    optimizer = GaLoreAdamW([group], lr=LR, **adamw_arguments)

    def step(gradient: torch.Tensor) -> None:
        weight.grad = gradient
        optimizer.step()

    return problem.walk(weight, step)


def walk_reference(problem: Problem, proj_type: str, **adamw_arguments) -> torch.Tensor:
    weight = problem.start.clone()
    optimizer = GaLoreAdam(weight, RANK, lr=LR, gap=GAP, scale=SCALE, proj_type=proj_type, **adamw_arguments)
    return problem.walk(weight, optimizer.step)


@pytest.fixture(scope="module")
def galore_1() -> Any:
    """galore-torch 1.0, imported by another name than ours has."""
    spec = importlib.util.spec_from_file_location("galore_1", installed(GALORE_1) / "galore_torch" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def walk_galore_1(galore_1: Any, problem: Problem, proj_type: str) -> torch.Tensor:
    weight = torch.nn.Parameter(problem.start.clone())
    group = {"params": [weight], "rank": RANK, "update_proj_gap": GAP, "scale": SCALE, "proj_type": proj_type}
    optimizer = galore_1.GaLoreAdamW([group], lr=LR, eps=NEGLIGIBLE_EPS, no_deprecation_warning=True)

    def step(gradient: torch.Tensor) -> None:
        weight.grad = gradient
        optimizer.step()

    return problem.walk(weight, step)


@every_shape
@every_proj_type
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.broad
def test_it_is_the_reference(shape, proj_type, dtype, tolerance):
    problem = Problem.make(SHAPES[shape], dtype)
    settings = {"betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}
    expected = walk_reference(problem, proj_type, **settings)
    assert distance(problem.start, expected[-1]) > 0.1  # it has gone somewhere
    assert distance(walk_ours(problem, proj_type, **settings), expected) <= tolerance


of_lapack = pytest.mark.of_cpu("moments that are kept in a new basis follow LAPACK's signs")


@pytest.mark.slow  # it imports Transformers
@of_lapack
@every_shape
@every_proj_type
def test_it_is_galore_torch_1(galore_1, shape, proj_type):
    problem = Problem.make(SHAPES[shape], torch.float32)
    expected = walk_galore_1(galore_1, problem, proj_type)
    assert distance(problem.start, expected[-1]) > 0.1
    assert distance(walk_ours(problem, proj_type, eps=NEGLIGIBLE_EPS), expected) <= 1e-5


@pytest.mark.slow
@of_lapack
@every_shape
@every_proj_type
def test_the_reference_is_galore_torch_1(galore_1, shape, proj_type):
    problem = Problem.make(SHAPES[shape], torch.float32)
    assert (
        distance(walk_reference(problem, proj_type, eps=NEGLIGIBLE_EPS), walk_galore_1(galore_1, problem, proj_type))
        <= 1e-5
    )


def test_a_later_renewal_is_another_path(monkeypatch):
    """The trajectories tell implementations apart: one that renews a step late is far beyond the tolerance."""
    problem = Problem.make(SHAPES["tall"], torch.float32)
    expected = walk_reference(problem, "std")
    monkeypatch.setitem(globals(), "GAP", GAP + 1)
    assert distance(walk_reference(problem, "std"), expected) > 1e-3
