"""What the LLaMA-7B benchmark says: time, memory and optimizer state as tables, its bars, JSON and panels."""

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from benchmarks.common.bars import Bar, judged
from benchmarks.common.memory import GIB, stored_bytes
from benchmarks.common.report import Report, Sheet
from benchmarks.llama_7b.floor import Floor
from benchmarks.llama_7b.model import TrainingCase
from benchmarks.llama_7b.steps import Step

GB = 1e9
ADAMW = "AdamW, BF16"
SIXTEEN_BIT = "GaLore, BF16 (by shapes)"
EIGHT_BIT = "8-bit moments, BF16 bases"
HELD = "8-bit moments, {}-bit bases, held"


@dataclass(frozen=True, kw_only=True)
class State:
    """The bytes of an optimizer's state, from its real tensors."""

    held: int  # all of it, scales included
    bases: int  # of it, the bases
    codes: int  # what the codes take alone, of bases and moments
    basis_codes: int  # of it, those of the bases

    @classmethod
    def of(cls, optimizer: Optimizer, held: int) -> "State":
        """Count the tensors of an optimizer that holds so many bytes in all (`galore_torch.optim.state_bytes`)."""
        states = [(_tensors(state.get("basis")), _tensors(state.get("inner"))) for state in optimizer.state.values()]
        basis_codes, inner_codes = (sum(_codes_bytes(parts[which]) for parts in states) for which in (0, 1))
        bases = sum(stored_bytes(basis) for basis, _ in states)
        return cls(held=held, bases=bases, codes=basis_codes + inner_codes, basis_codes=basis_codes)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _codes_bytes(tensors: list[Tensor]) -> int:
    """The bytes of one weight's codes; of all its numbers where it has no codes."""
    return stored_bytes([tensor for tensor in tensors if tensor.dtype in (torch.uint8, torch.int8)] or tensors)


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """All that was measured."""

    case: TrainingCase  # what ran
    steps: list[Step]  # in order; the first finds every basis
    base_bytes: int  # what the process took before there was a model
    building_s: float  # seconds of making the model
    building_bytes: int  # the most memory that the process took meanwhile
    weight_bytes: int  # of the model
    state: State  # of the optimizer, after the last step
    floor: Floor | None  # of an ordinary step

    @property
    def highest(self) -> Step:
        """The step that took the most memory."""
        return max(self.steps, key=lambda step: step.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """The most memory that the process took."""
        return max(self.building_bytes, self.highest.peak_bytes)

    def ordinary_s(self, *names: str) -> float:
        """Seconds of an ordinary step, or of these parts: the median of those after the first, without renewals."""
        parts = names or ("ordinary_s",)
        middle: float = median(sum(getattr(step, part) for part in parts) for step in self.steps[1:] or self.steps)
        return middle

    def kinds_bytes(self) -> dict[str, int]:
        """Return what the peak consists of."""
        kinds = {
            "weights": self.weight_bytes,
            "bases": self.state.bases,
            "moments": self.state.held - self.state.bases,
            "activations": self.highest.activation_bytes,
            "largest gradient": self.highest.gradient_bytes,
            "the process itself": self.base_bytes,
        }
        return {**kinds, "the rest": self.highest.peak_bytes - sum(kinds.values())}

    def states_bytes(self) -> dict[str, tuple[int, int]]:
        """Return the optimizer state by method: with scales, and codes alone."""
        size, state = self.case.size, self.state
        adamw = 2 * 2 * (sum(m * n for m, n in size.weights) + size.other_elements)
        plain_bases = 2 * size.basis_elements
        sixteen = 2 * (size.state_elements() + 2 * size.other_elements)
        return {
            ADAMW: (adamw, adamw),
            SIXTEEN_BIT: (sixteen, sixteen),
            EIGHT_BIT: (state.held - state.bases + plain_bases, state.codes - state.basis_codes + plain_bases),
            HELD.format(self.case.method.basis_bits): (state.held, state.codes),
        }

    def record(self) -> dict[str, Any]:
        """Return every figure as JSON, in seconds and bytes."""
        return {
            **asdict(self),
            "case": self.case.record(),
            "floor": self.floor and {**asdict(self.floor), "total_s": self.floor.total_s},
            "ordinary_s": self.ordinary_s(),
            "peak_bytes": self.peak_bytes,
            "kinds_bytes": self.kinds_bytes(),
            "states_bytes": {name: {"held": of[0], "codes": of[1]} for name, of in self.states_bytes().items()},
        }


def report(outcome: TrainingResult) -> Report:
    """Return all of it."""
    return Report(title=outcome.case.title, record=outcome.record(), sheets=sheets(outcome), bars=bars(outcome))


def bars(outcome: TrainingResult) -> list[Bar]:
    """Return the figures that have bars in this case."""
    states = outcome.states_bytes()
    figures = {f"state of {name} / AdamW's": held / states[ADAMW][0] for name, (held, _) in states.items()}
    figures["first renewal of all layers, min"] = outcome.steps[0].renewal_s / 60
    if len(outcome.steps) >= 3:
        figures["peak of the process, GiB"] = outcome.peak_bytes / GIB
    if outcome.floor is not None and len(outcome.steps) > 1:
        figures["ordinary step / the floor"] = outcome.ordinary_s() / outcome.floor.total_s
    return judged("llama_7b", outcome.case.record(), figures)


def sheets(outcome: TrainingResult) -> list[Sheet]:
    """Return all as tables that fit 80 columns: the steps, memory, the optimizer's state, and the floor."""
    parts = ("forward, s", "backward, s", "renewal, s", "optimizer, s")
    steps: dict[str, dict[str, Any]] = {}
    for number, step in enumerate(outcome.steps, 1):
        parts_s = step.forward_s, step.backward_s, step.renewal_s, step.optimizer_s
        figures = dict(zip(parts, parts_s, strict=True))
        figures |= {"all, s": sum(parts_s), "GiB": step.peak_bytes / GIB}
        steps[f"step {number}"] = {"loss": f"{step.loss:.4f}", **figures}
    caption = (
        f"GiB: the peak of the whole process in the step. Making the weights took {outcome.building_s:.0f} s and "
        f"{outcome.building_bytes / GIB:.2f} GiB. Optimizer: all that applies gradients, but for finding bases."
    )
    kinds = {**outcome.kinds_bytes(), "the whole process": outcome.highest.peak_bytes}
    memory = {kind: {"GiB": nbytes / GIB} for kind, nbytes in kinds.items()}
    states = outcome.states_bytes()
    state = {
        name: {
            "GB": held / GB,
            "smaller": f"{1 - held / states[ADAMW][0]:.1%}",
            "codes alone, GB": codes / GB,
            "codes alone, smaller": f"{1 - codes / states[ADAMW][0]:.1%}",
        }
        for name, (held, codes) in states.items()
    }
    made = [
        Sheet(title=outcome.case.title, rows=steps, caption=caption, drawn=parts, unit="seconds"),
        Sheet(title="Memory at the peak", rows=memory, last=1, drawn=("GiB",), unit="memory of the process, GiB"),
        Sheet(title="Optimizer state", rows=state),
    ]
    if outcome.floor is not None:
        ours_s, floor = outcome.ordinary_s, outcome.floor
        rows = {
            "forward, backward": (ours_s("forward_s", "backward_s"), floor.pass_s),
            "projecting, if not in the backward": (ours_s("other_s"), floor.project_s),
            "projecting back into the weights": (ours_s("fold_s"), floor.fold_s),
            "the optimizer inside": (ours_s("inner_s"), floor.inner_s),
            "all": (ours_s(), floor.total_s),
        }
        caption = f"Ours is {ours_s() / floor.total_s:.2f} of the floor, in which all is in bfloat16."
        floors = {name: {"ours": ours, "floor": least} for name, (ours, least) in rows.items()}
        made.append(Sheet(title="An ordinary step, seconds", rows=floors, caption=caption, last=1))
        steps["floor"] = {parts[1]: floor.pass_s, parts[3]: floor.total_s - floor.pass_s}
    return made
