"""`plan`: what a training will need of memory, before anything of it is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from galore_torch.memory.recorder import KINDS
from galore_torch.memory.rehearsal import Job, Rehearsal, rehearse


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a training needs, in bytes.

    Attributes:
        held: by kind. Of weights, states and bases what there is from the first step on; of gradients what there is
            before a step; of the others the most there is at a time.
        peak: by kind, what there is at the moment when it is the most.
        phase: when that is.
        phases: by phase, what there is of each kind at its highest moment.
        parameters: how many the model has.
        trained: how many of them are trained.
        untraced: why activations, logits and work are not known, such as an operation's name; None if they are.
    """

    held: dict[str, int]
    peak: dict[str, int]
    phase: str
    phases: Mapping[str, Mapping[str, int]]
    parameters: int
    trained: int
    untraced: str | None = None

    @property
    def peak_bytes(self) -> int:
        """The most at a time."""
        return sum(self.peak.values())

    def as_json(self) -> dict[str, Any]:
        """The plan for a JSON file."""
        return {
            "peak_bytes": self.peak_bytes,
            "phase": self.phase,
            "held": self.held,
            "peak": self.peak,
            "parameters": self.parameters,
            "trained_parameters": self.trained,
            "untraced": self.untraced,
        }


def plan(job: Job, *, exact: bool = False) -> MemoryPlan:
    """Find out what a training needs.

    Args:
        job: what is trained, and how.
        exact: whether all of a model is rehearsed that has many blocks which are all alike.

    Returns:
        The plan. Of weights, gradients, states and bases it is equal to what will be allocated.

    Raises:
        ValueError: what the job's own functions raise, such as a rank that does not fit.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from galore_torch import GaLoreAdamW, param_groups
        >>> sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> with torch.device("meta"):
        ...     model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256))
        >>> batch = {"input_ids": (4, 32), "labels": (4, 32)}
        >>> planned = plan(Job(model=model, optimizer=lambda m: GaLoreAdamW(param_groups(m, rank=8)), batch=batch))
        >>> planned.held["weights"], planned.held["gradients"], planned.held["bases"]
        (460160, 460032, 28672)
    """
    return _planned(rehearse(job, exact=exact))


def _planned(rehearsal: Rehearsal) -> MemoryPlan:
    phase = max(rehearsal.peaks, key=lambda name: rehearsal.peaks[name].total())
    held = {kind: max(each[kind] for each in rehearsal.peaks.values()) for kind in KINDS} | rehearsal.held
    unknown = ("activations", "logits", "work") if rehearsal.untraced is not None else ()

    def known(kinds: Mapping[str, int]) -> dict[str, int]:
        return {kind: 0 if kind in unknown else kinds[kind] for kind in KINDS}

    return MemoryPlan(
        held=known(held),
        peak=known(rehearsal.peaks[phase]),
        phase=phase,
        phases={name: known(kinds) for name, kinds in rehearsal.peaks.items()},
        parameters=rehearsal.parameters,
        trained=rehearsal.trained,
        untraced=rehearsal.untraced,
    )
