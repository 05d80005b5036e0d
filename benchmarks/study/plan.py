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
SEEDED = 2  # how many of a method's best pairs of rates are trained with every seed
CORE = ("adamw", "galore", "galore-rotate", "fira", "columns", "orthogonal", "muon")
"""Those that must be known first."""

LONGER = 1600  # steps, for AdamW, GaLore and the best two others
BATCHES = (1024, 8192)  # tokens a step, for the same


def at_seed_0(known: Known, method: str, steps: int | None = None, tokens: int | None = None) -> dict[Job, float]:
    """Return what is known of a method at one length and batch, the study's own unless it is said, best first."""
    like = start(method)
    wanted = steps or like.steps, tokens or like.tokens
    found = {job: value for job, value in known.items() if job.method == method and job.seed == 0}
    return dict(sorted(((j, v) for j, v in found.items() if (j.steps, j.tokens) == wanted), key=lambda pair: pair[1]))


def start(method: str) -> Job:
    """Return the middle of a method's grid."""
    return Job(method=method, lr=METHODS[method].lr, others_lr=METHODS[method].others_lr)


def at(job: Job, *factors: tuple[float, float]) -> list[Job]:
    """Return trainings at other rates: those of the matrices and of the others by these factors."""
    return [replace(job, lr=job.lr * lr, others_lr=job.others_lr * others) for lr, others in factors]


def search(method: str, known: Known) -> list[Job]:
    """Return what a method's search wants next: what surrounds its best rates so far, and nothing at its end."""
    first = [job for job in at(start(method), (1, 1), (0.5, 1), (2, 1)) if job not in known]
    if first:
        return first
    best, value = next(iter(at_seed_0(known, method).items()))
    around = at(best, (0.5, 1), (2, 1), (1, 0.5), (1, 2)) if math.isfinite(value) else []
    return [job for job in around if job not in known]


def seeds(found: Mapping[Job, float]) -> Iterator[Job]:
    """Yield the other seeds of the best."""
    for job, value in list(found.items())[:SEEDED]:
        if math.isfinite(value):
            yield from (replace(job, seed=seed) for seed in SEEDS[1:])


def means(known: Known, method: str, steps: int | None = None, tokens: int | None = None) -> dict[Job, list[float]]:
    """Return the perplexities of all seeds, by the training at the first, where all are known; the best mean first."""
    found = at_seed_0(known, method, steps, tokens)
    values = {job: [known.get(replace(job, seed=seed), math.nan) for seed in SEEDS] for job in found}
    return dict(sorted(((j, v) for j, v in values.items() if not math.isnan(sum(v))), key=lambda pair: mean(pair[1])))


def leaders(known: Known, methods: Sequence[str]) -> list[str]:
    """Return AdamW, GaLore and the best two others."""
    score = {name: next(iter(at_seed_0(known, name).values()), math.inf) for name in methods}
    rivals = sorted((name for name in methods if name not in CORE[:2]), key=score.__getitem__)[:2]
    return [name for name in (*CORE[:2], *rivals) if math.isfinite(score.get(name, math.inf))]


def elsewhere(methods: Sequence[str], known: Known, **changes: Any) -> Iterator[Job]:
    """Yield trainings of other length or batch, of every seed: at the best rates, and where better ones may lie."""
    firsts = [replace(next(iter(at_seed_0(known, method))), **changes) for method in methods]
    factor = 2.0 if changes.get("tokens", 0) > Job.tokens else 0.5
    pairs = [pair for first in firsts for pair in at(first, (1, 1), (factor, 1))]
    yield from (replace(pair, seed=seed) for seed in SEEDS for pair in pairs)


def wanted(known: Known, methods: Sequence[str]) -> Iterator[Job]:
    """Yield the trainings that are wanted, the most important first.

    Args:
        known: what is known.
        methods: those that take part.
    """
    core = [name for name in CORE if name in methods]
    for part in (core, [name for name in methods if name not in CORE]):
        for name in part:
            yield from search(name, known)
        settled = [name for name in part if not search(name, known)]
        for name in settled:
            yield from seeds(at_seed_0(known, name))
        if part is core and len(settled) == len(core):
            yield from elsewhere(leaders(known, core), known, steps=LONGER)
    if all(not search(name, known) for name in methods):
        for tokens in BATCHES:
            yield from elsewhere(leaders(known, methods), known, tokens=tokens)
