"""One method in a process of its own: it builds the model and takes a whole training step when it is told to."""

from typing import Any

import torch

from benchmarks.common import products
from benchmarks.common.memory import Footprint, held_bytes, stored_bytes, tensors_alive
from benchmarks.common.methods import set_up
from benchmarks.common.timing import now_s
from benchmarks.common.worker import Commands
from benchmarks.steps.training import Training


class TrainingProcess:
    """A model under one method."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self.model = training.size.model(training.torch_dtype, training.device)
        self._tokens = torch.Generator().manual_seed(0)
        self._at_start = tensors_alive()
        self._footprint = Footprint(training.device)
        self._close = set_up(self.model, training.size, training.method, stagger=training.stagger)

    def step(self) -> dict[str, float]:
        """Take one step.

        Returns:
            `seconds` of the step; `peak`, the most memory above the weights during it; `gradients`, what the gradients
            take when the backward pass has ended. All in bytes.
        """
        training, device = self._training, self._training.device
        shape = (training.tokens // training.size.sequence, training.size.sequence)
        ids = torch.randint(training.size.vocabulary, shape, generator=self._tokens).to(device)
        self._footprint.forget()
        start_s = now_s(device)
        for part in ids.chunk(training.micro_batches):
            loss = self.model(input_ids=part, labels=part).loss / training.micro_batches
            loss.backward()
        backward_s = now_s(device)
        gradient_bytes = stored_bytes(weight.grad for weight in self.model.parameters())
        resumed_s = now_s(device)
        self._close()
        seconds = backward_s - start_s + now_s(device) - resumed_s
        return {"seconds": seconds, "peak": self._footprint.peak_bytes(), "gradients": gradient_bytes}

    def state(self) -> dict[str, float]:
        """Return what is kept between steps: the bytes of the `weights` and of the optimizer's `state`."""
        return {"weights": stored_bytes(self.model.parameters()), "state": sum(held_bytes(self._at_start).values())}


def commands(request: dict[str, Any]) -> Commands:
    """Build what a request describes, a `Training` that was taken apart: "step" and "state"."""
    training = Training.of(request)
    torch.set_num_threads(training.threads)
    products.in_float32()
    # Libraries load and set up at their first use what they need for good: that is not to count as the method's.
    TrainingProcess(training.tiny()).step()
    process = TrainingProcess(training)
    return {"step": process.step, "state": process.state}
