"""One method in a process of its own: it builds the model and takes a whole training step when it is told to.

`processes.py` starts it as a script. Its one argument is a `Training` in JSON; its commands are "step" and "state".
"""

import json
import time

import torch

from benchmarks import products
from benchmarks.contender import held_bytes, tensors_alive
from benchmarks.footprint import Footprint, stored_bytes
from benchmarks.methods import METHODS
from benchmarks.serving import Answers, serve
from benchmarks.training import Training


class TrainingProcess:
    """A model under one method.

    Args:
        training: What to be.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._model = training.model()
        self._tokens = torch.Generator().manual_seed(0)
        self._at_start = tensors_alive()
        self._footprint = Footprint(training.device)
        self._close = METHODS[training.method].set_up(self._model, training)

    def step(self) -> dict[str, float]:
        """Take one step.

        Returns:
            `seconds` of the step; `peak`, the most memory above the weights during it; `gradients`, what the gradients
            take when the backward pass has ended. All in bytes.
        """
        training = self._training
        ids = self._draw(training.batch * training.micro_batches, training.sequence)
        self._footprint.forget()
        start_s = self._now_s()
        for part in ids.chunk(training.micro_batches):
            loss = self._model(input_ids=part, labels=part).loss / training.micro_batches
            loss.backward()
        backward_s = self._now_s()
        gradient_bytes = stored_bytes(weight.grad for weight in self._model.parameters())
        resumed_s = self._now_s()
        self._close()
        seconds = backward_s - start_s + self._now_s() - resumed_s
        return {"seconds": seconds, "peak": self._footprint.peak_bytes(), "gradients": gradient_bytes}

    def state(self) -> dict[str, float]:
        """Return what is kept between steps: the bytes of the `weights` and of the optimizer's `state`."""
        kept = held_bytes(self._at_start)
        return {"weights": stored_bytes(self._model.parameters()), "state": kept["state"] + kept["counters"]}

    def _draw(self, sequences: int, length: int) -> torch.Tensor:
        """Return random tokens."""
        ids = torch.randint(self._training.vocabulary, (sequences, length), generator=self._tokens)
        return ids.to(self._training.device)

    def _now_s(self) -> float:
        """Return the time when all work that was queued is done."""
        if self._training.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def answers(argument: str) -> Answers:
    """Build the process that a request in JSON asks for."""
    training = Training(**json.loads(argument))
    torch.set_num_threads(training.threads)
    products.in_float32()
    # Libraries load and set up at their first use what they need for good: that is not to count as the method's.
    TrainingProcess(training.tiny()).step()
    process = TrainingProcess(training)
    return {"step": process.step, "state": process.state}


if __name__ == "__main__":
    serve(answers)
