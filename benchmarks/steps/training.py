"""What a process of the benchmark of whole training steps is asked to be."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.common.methods import METHODS, REFERENCE, Method
from benchmarks.common.sizes import REHEARSAL, Llama


@dataclass(frozen=True, kw_only=True)
class Training:
    """Whole training steps of a LLaMA on random tokens.

    Raises:
        ValueError: Tokens that are no whole number of batches, or gradients that would accumulate under a method that
            moves weights inside the backward pass.
    """

    name: str  # key of `METHODS`
    size: Llama  # the model
    tokens: int  # tokens in a step
    batch: int  # sequences at once; gradients accumulate until the step has its tokens
    stagger: bool  # whether our layers take turns to renew
    dtype: str  # name of the torch dtype of the weights
    device: str  # where it runs: cpu or cuda
    threads: int  # threads of torch

    def __post_init__(self) -> None:
        if self.tokens % (self.batch * self.size.sequence):
            raise ValueError(
                f"tokens is {self.tokens}, which is not a multiple of {self.batch} sequences of {self.size.sequence}; "
                "choose another number of tokens or another batch"
            )
        if self.micro_batches > 1 and self.method.update == "backward":
            raise ValueError(
                f"{self.name} moves weights inside the backward pass and cannot accumulate {self.micro_batches} "
                "batches; leave out batch, or name methods that accumulate"
            )

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> "Training":
        """Return what `asdict` has taken apart."""
        return cls(**{**request, "size": Llama(**request["size"])})

    @property
    def method(self) -> Method:
        """The way of training."""
        return METHODS[self.name]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        made: torch.dtype = getattr(torch, self.dtype)
        return made

    @property
    def micro_batches(self) -> int:
        """How many backward passes a step takes."""
        return self.tokens // (self.batch * self.size.sequence)

    @property
    def title(self) -> str:
        """What is trained, in words."""
        times = f"{self.micro_batches} times " if self.micro_batches > 1 else ""
        return (
            f"LLaMA {self.size.hidden} wide, {self.size.layers} layers, {self.dtype}, rank {self.size.rank}, "
            f"{times}{self.batch} x {self.size.sequence} tokens a step"
        )

    def tiny(self) -> "Training":
        """Return the same method on next to nothing, for a rehearsal."""
        return replace(self, size=REHEARSAL, tokens=REHEARSAL.sequence, batch=1)

    def case(self, measured: str) -> dict[str, Any]:
        """Return what bars may depend on."""
        return {"measured": measured, **asdict(self.size), **{k: v for k, v in asdict(self).items() if k != "size"}}


def trainings(
    names: Iterable[str], size: Llama, *, tokens: int, batch: int | None = None, **others: Any
) -> list[Training]:
    """Return what to measure: the reference, then the other methods; without `batch` all of a step at once."""
    batch = batch or max(1, tokens // size.sequence)
    return [
        Training(name=name, size=size, tokens=tokens, batch=batch, **others)
        for name in dict.fromkeys([REFERENCE, *names])
    ]
