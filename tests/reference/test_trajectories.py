"""The package walks the path of the paper's algorithm, and so does galore-torch 1.0 where the three mean the same."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.common.peers import GALORE_1, ROOT, installed
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
def galore_1(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The trajectories of galore-torch 1.0 by "shape proj_type", walked in a process that imports it and not ours."""
    path = tmp_path_factory.mktemp("galore-torch-1.0") / "trajectories.pt"
    script = Path(__file__).with_name("galore_1.py")
    path_of_child = [str(installed(GALORE_1)), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    child = subprocess.run(  # of a script: -m would put the checkout before the peer
        [sys.executable, str(script), str(path), str(NEGLIGIBLE_EPS)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path_of_child)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return torch.load(path, weights_only=True)


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


@pytest.mark.slow  # one more process imports torch
@of_lapack
@every_shape
@every_proj_type
def test_it_is_galore_torch_1(galore_1, shape, proj_type):
    problem = Problem.make(SHAPES[shape], torch.float32)
    expected = galore_1[f"{shape} {proj_type}"]
    assert distance(problem.start, expected[-1]) > 0.1
    assert distance(walk_ours(problem, proj_type, eps=NEGLIGIBLE_EPS), expected) <= 1e-5


@pytest.mark.slow
@of_lapack
@every_shape
@every_proj_type
def test_the_reference_is_galore_torch_1(galore_1, shape, proj_type):
    problem = Problem.make(SHAPES[shape], torch.float32)
    assert distance(walk_reference(problem, proj_type, eps=NEGLIGIBLE_EPS), galore_1[f"{shape} {proj_type}"]) <= 1e-5


def test_a_later_renewal_is_another_path(monkeypatch):
    """The trajectories tell implementations apart: one that renews a step late is far beyond the tolerance."""
    problem = Problem.make(SHAPES["tall"], torch.float32)
    expected = walk_reference(problem, "std")
    monkeypatch.setitem(globals(), "GAP", GAP + 1)
    assert distance(walk_reference(problem, "std"), expected) > 1e-3
