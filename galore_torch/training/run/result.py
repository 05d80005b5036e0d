"""What a run came to: its last record, and what a command shows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to. One that was stopped has None for what needs an evaluation."""

    out: str  # the run folder
    optimizer: str
    adapter: str  # or "none"
    finished: bool
    step: int  # optimizer steps made, over all resumptions
    best_step: int | None  # the one whose weights the model has, if it has those of the best evaluation
    eval_loss: float | None  # on what is held out, at the end; nats per token of a language model
    state_bytes: int  # of the optimizer
    peak_memory_bytes: int  # of the GPU if there is one, of the process otherwise
    planned_memory_bytes: int | None  # the same, as it was planned before the first step; None if it was not
    parameters: int  # of the model, as it is saved
    trained_parameters: int  # those that the optimizer moves, of the model or of its adapters
    seconds: float  # time spent in training steps
    renewals: int  # bases found, over all weights and resumptions; 0 for an optimizer that does not project
    overlap: float | None  # of each weight's last two subspaces, on average: 1 for the same, 0 as of random ones
    checkpoint: str | None  # from which a stopped run is resumed

    @property
    def headline(self) -> str:
        """The scores and the pace, for people."""
        raise NotImplementedError

    @property
    def remarks(self) -> list[str]:
        """What people must know of the scores, a sentence each."""
        best = self.best_step
        return [] if best is None else [f"The model is that of step {best:,} of {self.step:,}, which scored best."]
