"""Walks every problem with galore-torch 1.0 and saves the trajectories in the file that is named as its argument.

A script for a child process in which `galore_torch` is 1.0.
"""

import sys

import torch

from galore_torch import GaLoreAdamW
from tests.reference.problem import GAP, LR, PROJ_TYPES, RANK, SCALE, SHAPES, Problem


def trajectory(problem: Problem, proj_type: str) -> torch.Tensor:
    weight = torch.nn.Parameter(problem.start.clone())
    group = {"params": [weight], "rank": RANK, "update_proj_gap": GAP, "scale": SCALE, "proj_type": proj_type}
    optimizer = GaLoreAdamW([group], lr=LR, eps=float(sys.argv[2]), no_deprecation_warning=True)

    def step(gradient: torch.Tensor) -> None:
        weight.grad = gradient
        optimizer.step()

    return problem.walk(weight, step)


if __name__ == "__main__":
    torch.save(
        {
            f"{name} {proj_type}": trajectory(Problem.make(shape, torch.float32), proj_type)
            for name, shape in SHAPES.items()
            for proj_type in PROJ_TYPES
        },
        sys.argv[1],
    )
