"""A step between two renewals in a CUDA graph: what it reads, and what it writes, is on the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from galore_torch import GaLore

SHAPES = [(16, 48), (48, 16), (16, 16)]
STEPS = 4


class Trained:
    """Some weights, their gradients in fixed places, and AdamW with its rate and its step count on the device."""

    def __init__(self, device: str, **keys) -> None:
        torch.manual_seed(0)
        self.weights = [torch.nn.Parameter(torch.randn(shape).to(device)) for shape in SHAPES]
        self.plain = torch.nn.Parameter(torch.randn(16).to(device))
        self.rate = torch.tensor(0.01, device=device)
        self.optimizer = GaLore(
            [{"params": self.weights, "rank": 4, "update_proj_gap": 1000, **keys}, {"params": [self.plain]}],
            optimizer_class=torch.optim.AdamW,
            lr=self.rate,
            weight_decay=0.1,
            capturable=device == "cuda",
        )
        for weight in self.all:
            weight.grad = torch.zeros_like(weight)

    @property
    def all(self) -> list[Tensor]:
        """All weights."""
        return [*self.weights, self.plain]

    def load(self, step: int) -> None:
        """Puts the gradients and the learning rate of a step in their places."""
        generator = torch.Generator().manual_seed(step)
        for weight in self.all:
            weight.grad.copy_(torch.randn(weight.shape, generator=generator, device="cpu"))
        self.rate.fill_(0.01 / (1 + step))

    def step(self, step: int) -> None:
        """Makes one step."""
        self.load(step)
        self.optimizer.step()


@pytest.mark.parametrize("keys", [{}, {"proj_type": "full"}, {"basis_bits": 8}], ids=str)
def test_a_captured_step_moves_weights_as_the_others_do(device, keys):
    if device != "cuda":
        pytest.skip("a CPU captures no graphs; run it with --device cuda")
    captured, plain = Trained(device, **keys), Trained(device, **keys)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(3):  # the first finds the bases, the next reads how that went
            captured.step(step)
    torch.cuda.current_stream().wait_stream(side)
    for step in range(3):
        plain.step(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.optimizer.step()
    before = [weight.detach().clone() for weight in captured.all]
    for step in range(3, 3 + STEPS):
        captured.load(step)
        graph.replay()
        plain.step(step)
    for ours, theirs, old in zip(captured.all, plain.all, before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert not torch.equal(ours, old)
