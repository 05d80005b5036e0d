"""The choices that throughput and memory share on the command line, and the trainings that they come to."""

from collections.abc import Iterable
from enum import Enum
from typing import Annotated

import torch
import typer

from benchmarks.methods import METHODS, REFERENCE
from benchmarks.training import Training
from galore_torch.training.presets import PRESETS, configure

Preset = Enum("Preset", {name: name for name in PRESETS}, type=str)  # type: ignore[misc]
MethodName = Enum("MethodName", {name: name for name in METHODS}, type=str)  # type: ignore[misc]


class Dtype(str, Enum):
    """The precisions of the paper's runs and of exact comparisons."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Device(str, Enum):
    """Where the steps run."""

    CPU = "cpu"
    CUDA = "cuda"


PresetOption = Annotated[Preset, typer.Option(help="Which LLaMA.")]
TokensOption = Annotated[int | None, typer.Option(min=1, help="Tokens a step.", show_default=False)]
BatchOption = Annotated[
    int | None, typer.Option(min=1, help="Sequences at once; left out, all of a step.", show_default=False)
]
DtypeOption = Annotated[Dtype, typer.Option(help="Of the weights.")]
DeviceOption = Annotated[Device, typer.Option(help="Where the steps run.")]
RankOption = Annotated[int | None, typer.Option(min=1, help="Left out, the preset's.", show_default=False)]
MethodsOption = Annotated[
    list[MethodName] | None, typer.Option(help=f"Repeat for more; {REFERENCE} is always measured.", show_default=False)
]
ThreadsOption = Annotated[int, typer.Option(min=1, help="Threads of torch in each process.")]
LLAMA_350M = Preset("llama-350m")
THREADS = torch.get_num_threads()


def trainings(
    methods: Iterable[str],
    *,
    preset: str,
    sequences: int,
    tokens: int | None,
    batch: int | None,
    dtype: str,
    rank: int | None,
    **others: object,
) -> list[Training]:
    """Return what to measure: the reference, then the other methods.

    Args:
        methods: Keys of `METHODS`.
        preset: Key of `PRESETS`.
        sequences: Of a step, if `tokens` does not tell.
        tokens: Of a step; None for `sequences` of the preset's length.
        batch: Sequences at once; all of a step when None.
        dtype: Of the weights.
        rank: Of the projection; the preset's when None.
        **others: Further fields of `Training`.

    Raises:
        ValueError: Tokens that are no whole number of batches, or gradients that would accumulate under a method that
            moves weights inside the backward pass.

    >>> [
    ...     one.method
    ...     for one in trainings(
    ...         ["fused/step"],
    ...         preset="llama-60m",
    ...         sequences=16,
    ...         tokens=None,
    ...         batch=None,
    ...         dtype="bfloat16",
    ...         rank=None,
    ...         gap=200,
    ...         stagger=True,
    ...         device="cpu",
    ...         threads=1,
    ...     )
    ... ]
    ['adamw', 'fused/step']
    """
    config = configure(preset)
    sequence = config.data.seq
    tokens = tokens or sequences * sequence
    made = []
    for method in dict.fromkeys([REFERENCE, *methods]):
        training = Training(
            method=method,
            hidden=config.model.hidden,
            intermediate=config.model.intermediate,
            layers=config.model.layers,
            heads=config.model.heads,
            vocabulary=config.data.vocab,
            sequence=sequence,
            tokens=tokens,
            batch=batch or max(1, tokens // sequence),
            rank=rank or config.optimizer.rank,
            dtype=dtype,
            **others,  # type: ignore[arg-type]
        )
        if training.micro_batches > 1 and METHODS[method].in_backward:
            raise ValueError(
                f"{method} moves weights inside the backward pass and cannot accumulate {training.micro_batches} "
                "batches; leave out batch, or name methods that accumulate"
            )
        made.append(training)
    return made
