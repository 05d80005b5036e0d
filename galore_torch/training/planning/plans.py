"""The plans of a model by method, what fits, and what is told of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from galore_torch.memory import KINDS, MemoryPlan, plan
from galore_torch.training.planning.subject import Subject
from galore_torch.training.settings.methods import METHODS
from galore_torch.units import readable

MB, GB = 1e6, 1e9

HEADINGS = ("weights", "grads", "states", "bases", "acts", "logits", "work", "peak", "fits")
"""Of what a plan holds of each kind, in the order of `KINDS`, and of its peak."""
LEGEND = (
    "weights to bases: what there is from the first step on; grads: before a step; acts (activations), logits and "
    "work: the most of each at a time. peak: the most of all at one time, which is less than their sum. A GPU's driver "
    "and its libraries take some 0.5 GB besides."
)


def plans(subject: Subject, methods: Sequence[str]) -> Iterator[tuple[str, MemoryPlan]]:
    """Plan the training of a model by each method in turn; what differs in its learning rates alone is planned once."""
    known: dict[str, MemoryPlan] = {}
    for method in methods:
        config = subject.settings(method)
        adapter = config.adapter.adapter.removeprefix("re")
        of_memory = dataclasses.replace(config.optimizer, lr=1.0, others_lr=None)
        key = f"{of_memory}{adapter}{config.adapter.adapter_rank}{config.schedule.batch}"
        if key not in known:
            known[key] = plan(subject.job(method))
        yield method, known[key]


def best_that_fits(found: Mapping[str, MemoryPlan], memory: int) -> str | None:
    """The method that gives up least and fits: adapters last, then weights, updates and states as they are first."""

    def given_up(method: str) -> tuple[Any, ...]:
        settings = METHODS[method]
        few_bits = "8bit" in settings["optim"]
        return (
            settings["adapter"] != "none",
            settings["weight_bits"] == 8,
            settings["update"] == "backward",
            few_bits,
            list(METHODS).index(method),
        )

    return min((name for name, one in found.items() if one.peak_bytes <= memory), key=given_up, default=None)


def smaller(subject: Subject, method: str, memory: int) -> tuple[dict[str, Any], MemoryPlan]:
    """The first plan that fits, or the smallest, of activations that are computed again and of ever fewer rows."""
    micro_batch = subject.settings(method).micro_batch
    given: dict[str, Any] = {"gradient_checkpointing": True}
    while True:
        changed = dataclasses.replace(subject, given={**subject.given, **given})
        found = next(iter(plans(changed, [method])))[1]
        if found.peak_bytes <= memory or micro_batch == 1:
            return given, found
        micro_batch //= 2
        given |= {"micro_batch": micro_batch, "batch": micro_batch}


def cells(planned: MemoryPlan, memory: int | None, unit: float) -> list[str]:
    """A plan's figures, one for each of `HEADINGS`; the last only if there is a memory.

    Args:
        planned: the plan.
        memory: what there is, in bytes.
        unit: of the figures, in bytes.
    """
    unknown = ("activations", "logits", "work") if planned.untraced is not None else ()
    digits = 2 if unit == GB else 1
    held = ["?" if kind in unknown else f"{planned.held[kind] / unit:.{digits}f}" for kind in KINDS]
    peak = f"{'>' if unknown else ''}{planned.peak_bytes / unit:.{digits}f}"
    fits = [] if memory is None else ["yes" if planned.peak_bytes <= memory else "no"]
    return [*held, peak, *fits]


def notes(found: Mapping[str, MemoryPlan], memory: int | None, best: str | None) -> list[str]:
    """What is to be said of the plans beside their figures."""
    lines = []
    for method, one in found.items():
        if one.untraced is not None:
            lines.append(
                f"{method}: activations, logits and work are not known, and peak is without them, for the forward "
                f"cannot be made without numbers: {one.untraced}"
            )
        full = found.get("full")
        if full is not None and one.held["bases"] and one.held["states"] + one.held["bases"] >= full.held["states"]:
            lines.append(f"{method}: its rank saves nothing; states and bases take what full's states take, or more.")
    shown = best or min(found, key=lambda name: found[name].peak_bytes)
    peak = found[shown].peak
    kind = max(peak, key=lambda name: peak[name])
    lines.append(f"{shown}: the most of its peak, {readable(peak[kind])}, is {kind}.")
    if best is not None and memory is not None:
        lines.append(f"Fits {readable(memory)} and gives up least: {best}, {readable(found[best].peak_bytes)}.")
    return lines
