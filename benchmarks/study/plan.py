"""Which trainings are wanted next, after what is known: the best rates of each method first, then seeds, then more."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from benchmarks.study.methods import METHODS
from benchmarks.study.training import Job

Known = Mapping[Job, float]
"""Perplexities of trainings that have ended; infinite where they came apart or failed."""

SEEDS = (0, 1, 2)
LONG = ("adamw", "galore", "orthogonal", "muon")
FIRST = ("fira", "columns", "sumo", "apollo", "scale")
THEN = ("factored", "switched", "sampled", "fira-published", "alice")
"""What must be known first, next, and before all others; the first are trained longer and in other batches too."""

LONGER = 1600  # steps
BATCHES = (1024, 8192)  # tokens a step


def at_seed_0(known: Known, method: str, steps: int | None = None, tokens: int | None = None) -> dict[Job, float]:
    """Return what is known of a method at one length and batch, the study's own unless it is said, best first."""
    like = start(method)
    wanted = steps or like.steps, tokens or like.tokens
    found = {job: value for job, value in known.items() if job.method == method and job.seed == 0}
    return dict(sorted(((j, v) for j, v in found.items() if (j.steps, j.tokens) == wanted), key=lambda pair: pair[1]))


def start(method: str, steps: int = Job.steps) -> Job:
    """Return the middle of a method's grid."""
    return Job(method=method, lr=METHODS[method].lr, others_lr=METHODS[method].others_lr, steps=steps)


def at(job: Job, *factors: tuple[float, float]) -> list[Job]:
    """Return trainings at other rates: those of the matrices and of the others by these factors."""
    return [replace(job, lr=job.lr * lr, others_lr=job.others_lr * others) for lr, others in factors]


def search(method: str, known: Known, steps: int = Job.steps) -> list[Job]:
    """Return what a method's search wants next: what surrounds its best rates so far, and nothing at its end."""
    around = (1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.5), (1.0, 2.0)
    first = [job for job in at(start(method, steps), *around) if job not in known]
    if first:
        return first
    best, value = next(iter(at_seed_0(known, method, steps).items()))
    return [job for job in at(best, *around) if job not in known and math.isfinite(value)]


def means(known: Known, method: str, steps: int | None = None, tokens: int | None = None) -> dict[Job, list[float]]:
    """Return the perplexities of all seeds, by the training at the first, where all are known; the best mean first."""
    found = at_seed_0(known, method, steps, tokens)
    values = {job: [known.get(replace(job, seed=seed), math.nan) for seed in SEEDS] for job in found}
    return dict(sorted(((j, v) for j, v in values.items() if not math.isnan(sum(v))), key=lambda pair: mean(pair[1])))


def seeded(method: str, known: Known, pair: int = 0, factor: float = 1.0, **changes: Any) -> list[Job]:
    """Return all seeds of a method's best pair of rates (0), or its second (1); none before its search ends.

    The matrices' rate may be by a factor, and length or batch others.
    """
    found = [] if search(method, known) else list(at_seed_0(known, method).items())[pair : pair + 1]
    best = [replace(job, **changes) for job, value in found if math.isfinite(value)]
    return [replace(one, seed=seed) for job in best for one in at(job, (factor, 1.0)) for seed in SEEDS]


def searched(known: Known, methods: Sequence[str], steps: int) -> Iterator[Job]:
    """Yield what a search at another length wants: of each method the best rates, and then these with all seeds."""
    for name in methods:
        yield from (around := search(name, known, steps))
        for best in () if around else list(at_seed_0(known, name, steps))[:1]:
            yield from (replace(best, seed=seed) for seed in SEEDS)


def wanted(known: Known, methods: Sequence[str]) -> Iterator[Job]:
    """Yield the trainings that are wanted, the most important first; some of them may be known.

    Args:
        known: what is known.
        methods: those that take part.
    """
    rest = [name for name in methods if name not in {*LONG, *FIRST, *THEN}]
    long, first, then = ([name for name in part if name in methods] for part in (LONG, FIRST, THEN))
    for part in (long, first, then, rest):
        for name in part:
            yield from search(name, known)
        for name in part if part is long else ():
            yield from seeded(name, known, steps=LONGER)
        for name in part:
            yield from seeded(name, known)
    for name in (*long, *first, *then, *rest):
        yield from seeded(name, known, 1)
    for name in long:
        yield from seeded(name, known, factor=0.5, steps=LONGER)
    for tokens in BATCHES:
        for factor in (1.0, 2.0 if tokens > Job.tokens else 0.5):
            for name in long:
                yield from seeded(name, known, factor=factor, tokens=tokens)
