"""Training steps of the LLaMA-7B benchmark, each with its loss, its seconds by part and its memory by kind."""

import functools
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.common.memory import Footprint, stored_bytes
from benchmarks.llama_7b.model import Advance, TrainingCase, real_text
from galore_torch import GaLore
from galore_torch.gradients import attach
from galore_torch.optim import chunks as chunks_module
from galore_torch.optim.rule import Rule
from galore_torch.optim.trained_weight import TrainedWeight


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step came to."""

    loss: float  # before the step, nats per token
    forward_s: float  # seconds of the forward
    backward_s: float  # of the backward, without what follows
    renewal_s: float  # of finding new bases
    inner_s: float  # of the optimizer inside, on coordinates, embeddings, head and norms
    fold_s: float  # of projecting the coordinates back into the weights
    other_s: float  # of all else that applies gradients: projecting full ones, checks, reading bases in few bits
    renewed: int  # how many bases were found
    peak_bytes: int  # the most memory that the process took
    activation_bytes: int  # by how much the forward let it grow
    gradient_bytes: int  # the largest gradient that there was at a time

    @property
    def optimizer_s(self) -> float:
        """Seconds of applying gradients, renewals apart."""
        return self.inner_s + self.fold_s + self.other_s

    @property
    def ordinary_s(self) -> float:
        """Seconds of the step without its renewals."""
        return self.forward_s + self.backward_s + self.optimizer_s


class Calls:
    """What the calls of a function come to."""

    seconds, count = 0.0, 0


@contextmanager
def timed_calls(owner: Any, name: str) -> Iterator[Calls]:
    """Time the calls of a class's method or a module's function, whoever makes them."""
    calls, original = Calls(), getattr(owner, name)

    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start_s = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            calls.seconds += time.perf_counter() - start_s
            calls.count += 1

    with mock.patch.object(owner, name, timed):
        yield calls


class Steps:
    """A model under training, the same text in every step; `advance` is called as each gradient is complete."""

    def __init__(
        self, model: LlamaForCausalLM, optimizer: GaLore, case: TrainingCase, footprint: Footprint, advance: Advance
    ) -> None:
        self.model, self._optimizer, self._footprint = model, optimizer, footprint
        self._ids = real_text(case.size)
        self._largest_gradient_bytes = 0

        def note(weight: Tensor) -> None:
            self._largest_gradient_bytes = max(self._largest_gradient_bytes, stored_bytes([weight.grad]))
            advance()

        # Before those of `attach`, which free the gradients.
        hooks = [weight.register_post_accumulate_grad_hook(note) for weight in model.parameters()]  # type: ignore[no-untyped-call]
        attachment = attach(model, optimizer, case.method.gradients, case.method.update)
        self._undo = [attachment.remove, *(hook.remove for hook in hooks)]

    def step(self) -> Step:
        """Take one step."""
        self._footprint.forget()
        self._largest_gradient_bytes = 0
        with ExitStack() as stack:
            applying, renewing, inner, folding = (
                stack.enter_context(timed_calls(owner, name))
                for owner, name in (
                    (GaLore, "_apply"),
                    (TrainedWeight, "renew"),
                    (Rule, "step"),
                    (chunks_module, "fold"),
                )
            )
            before_bytes, start_s = self._footprint.taken_bytes(), time.perf_counter()
            loss = self.model(input_ids=self._ids, labels=self._ids).loss
            forward_s, after_bytes = time.perf_counter() - start_s, self._footprint.taken_bytes()
            start_s = time.perf_counter()
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
            rest_s = time.perf_counter() - start_s
        return Step(
            loss=float(loss.detach()),
            forward_s=forward_s,
            backward_s=rest_s - applying.seconds,
            renewal_s=renewing.seconds,
            inner_s=inner.seconds,
            fold_s=folding.seconds,
            other_s=applying.seconds - renewing.seconds - inner.seconds - folding.seconds,
            renewed=renewing.count,
            peak_bytes=self._footprint.base_bytes + self._footprint.peak_bytes(),
            activation_bytes=max(0, after_bytes - before_bytes),
            gradient_bytes=self._largest_gradient_bytes,
        )

    def close(self) -> None:
        """Leave the model as it was before, but for its weights."""
        while self._undo:
            self._undo.pop(0)()
