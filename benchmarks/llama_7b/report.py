"""What the LLaMA-7B benchmark says: time, memory and optimizer state as tables, its bars, JSON and panels."""

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from benchmarks.common.bars import Bar, judged
from benchmarks.common.console import GIB, Panel, table
from benchmarks.common.memory import stored_bytes
from benchmarks.llama_7b.floor import Floor
from benchmarks.llama_7b.model import Case
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
        states = list(optimizer.state.values())
        bases = [state.get("basis", {}) for state in states]
        basis_codes = sum(map(_codes_bytes, bases))
        moments_codes = sum(_codes_bytes(state.get("inner", {})) for state in states)
        return cls(
            held=held,
            bases=sum(stored_bytes(_tensors(basis)) for basis in bases),
            codes=basis_codes + moments_codes,
            basis_codes=basis_codes,
        )


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _codes_bytes(tree: Any) -> int:
    """The bytes of one weight's codes; of all its numbers where it has no codes."""
    tensors = _tensors(tree)
    codes = [tensor for tensor in tensors if tensor.dtype in (torch.uint8, torch.int8)]
    return stored_bytes(codes or tensors)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All that was measured."""

    case: Case  # what ran
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

    @property
    def ordinary_s(self) -> float:
        """Seconds of an ordinary step: the median of those after the first, without renewals."""
        return median(step.ordinary_s for step in self.steps[1:] or self.steps)

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


def bars(outcome: Outcome) -> list[Bar]:
    """Return the figures that have bars in this case."""
    states = outcome.states_bytes()
    figures = {f"state of {name} / AdamW's": held / states[ADAMW][0] for name, (held, _) in states.items()}
    figures["first renewal of all layers, min"] = outcome.steps[0].renewal_s / 60
    if len(outcome.steps) >= 3:
        figures["peak of the process, GiB"] = outcome.peak_bytes / GIB
    if outcome.floor is not None and len(outcome.steps) > 1:
        figures["ordinary step / the floor"] = outcome.ordinary_s / outcome.floor.total_s
    return judged("llama_7b", outcome.case.told(), figures)


def tables(outcome: Outcome) -> list[Table]:
    """Return all as tables that fit 80 columns."""
    made = [_steps_table(outcome), _memory_table(outcome), _states_table(outcome)]
    return made if outcome.floor is None else [*made, _floor_table(outcome, outcome.floor)]


def _steps_table(outcome: Outcome) -> Table:
    rows = []
    for number, step in enumerate(outcome.steps, 1):
        parts_s = (step.forward_s, step.backward_s, step.renewal_s, step.optimizer_s, step.ordinary_s + step.renewal_s)
        rows.append((str(number), f"{step.loss:.4f}", *map("{:.2f}".format, parts_s), f"{step.peak_bytes / GIB:.2f}"))
    caption = (
        f"GiB: the peak of the whole process in the step. Making the weights took {outcome.building_s:.0f} s and "
        f"{outcome.building_bytes / GIB:.2f} GiB. Optimizer: all that applies gradients, but for finding bases."
    )
    headings = ("step", "loss", "forward\ns", "backward\ns", "renewal\ns", "optimizer\ns", "all\ns", "GiB")
    return table(outcome.case.title, headings, rows, caption=caption)


def _memory_table(outcome: Outcome) -> Table:
    kinds = {**outcome.kinds_bytes(), "the whole process": outcome.highest.peak_bytes}
    rows = [(kind, f"{nbytes / GIB:.2f}") for kind, nbytes in kinds.items()]
    return table("Memory at the peak", ("kind", "GiB"), rows, last=1)


def _states_table(outcome: Outcome) -> Table:
    states, rows = outcome.states_bytes(), []
    for name, sizes in states.items():
        cells = [(f"{size / GB:.2f}", f"{1 - size / states[ADAMW][0]:.1%}") for size in sizes]
        rows.append((name, *(cell for pair in cells for cell in pair)))
    return table("Optimizer state", ("", "GB", "smaller", "codes\nalone, GB", "smaller"), rows)


def _floor_table(outcome: Outcome, floor: Floor) -> Table:
    steps = outcome.steps[1:] or outcome.steps
    ours = {name: median(getattr(step, name) for step in steps) for name in ("fold_s", "inner_s", "other_s")}
    passing_s = median(step.forward_s + step.backward_s for step in steps)
    rows = [
        ("forward, backward", passing_s, floor.pass_s),
        ("projecting, if not in the backward", ours["other_s"], floor.project_s),
        ("projecting back into the weights", ours["fold_s"], floor.fold_s),
        ("the optimizer inside", ours["inner_s"], floor.inner_s),
        ("all", outcome.ordinary_s, floor.total_s),
    ]
    cells = [(name, *map("{:.2f}".format, seconds)) for name, *seconds in rows]
    caption = f"Ours is {outcome.ordinary_s / floor.total_s:.2f} of the floor, in which all is in bfloat16."
    return table("An ordinary step, seconds", ("", "ours", "floor"), cells, caption=caption, last=1)


def record(outcome: Outcome) -> dict[str, Any]:
    """Return every figure as JSON, in seconds and bytes."""
    floor = None if outcome.floor is None else {**asdict(outcome.floor), "total_s": outcome.floor.total_s}
    states = {name: {"held": held, "codes": codes} for name, (held, codes) in outcome.states_bytes().items()}
    return {
        **asdict(outcome),
        "case": outcome.case.told(),
        "floor": floor,
        "ordinary_s": outcome.ordinary_s,
        "peak_bytes": outcome.peak_bytes,
        "kinds_bytes": outcome.kinds_bytes(),
        "states_bytes": states,
    }


def panels(outcome: Outcome) -> list[Panel]:
    """Return the seconds of every step, beside the floor, and what the peak consists of, as stacked bars."""
    names = [f"step {number}" for number in range(1, len(outcome.steps) + 1)]
    parts = {
        part: [getattr(step, f"{part}_s") for step in outcome.steps]
        for part in ("forward", "backward", "optimizer", "renewal")
    }
    if outcome.floor is not None:
        names.append("floor of a\nlater step")
        pass_s = outcome.floor.pass_s
        floor = {"backward": pass_s, "optimizer": outcome.floor.total_s - pass_s}
        for part, seconds in parts.items():
            seconds.append(floor.get(part, 0.0))
    kinds = {kind: [nbytes / GIB] for kind, nbytes in outcome.kinds_bytes().items()}
    return [
        Panel(label="seconds", names=names, parts=parts),
        Panel(label="memory of the process, GiB", names=["peak"], parts=kinds),
    ]
