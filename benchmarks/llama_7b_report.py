"""What the LLaMA-7B benchmark says: tables of time, memory and optimizer state, its bars, JSON and a chart."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from benchmarks.footprint import stored_bytes
from benchmarks.llama_7b_floor import Floor
from benchmarks.llama_7b_model import Case
from benchmarks.llama_7b_steps import Step
from benchmarks.report import Bar

GIB, GB = 2**30, 1e9


@dataclass(frozen=True, kw_only=True)
class State:
    """The bytes of an optimizer's state, from its real tensors.

    Attributes:
        held: All of it, scales included.
        bases: Of it, the bases.
        codes: What the codes take alone, of bases and moments.
        basis_codes: Of it, those of the bases.
    """

    held: int
    bases: int
    codes: int
    basis_codes: int

    @classmethod
    def of(cls, optimizer: Optimizer, held: int) -> "State":
        """Count an optimizer's tensors.

        Args:
            optimizer: Ours.
            held: All bytes of its state, see `galore_torch.optim.state_bytes`.
        """
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
    """All that was measured.

    Attributes:
        case: What ran.
        steps: In order; the first finds every basis.
        base_bytes: What the process took before there was a model.
        building_s: Seconds of making the model.
        building_bytes: The most memory that the process took meanwhile.
        weight_bytes: Of the model.
        state: Of the optimizer, after the last step.
        floor: Of an ordinary step.
    """

    case: Case
    steps: list[Step]
    base_bytes: int
    building_s: float
    building_bytes: int
    weight_bytes: int
    state: State
    floor: Floor | None

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
        case, state = self.case, self.state
        parameters = sum(m * n for m, n in case.shapes.weights) + case.other_elements
        adamw = 2 * 2 * parameters
        plain_bases = 2 * sum(case.rank * min(m, n) for m, n in case.shapes.weights)
        sixteen = 2 * (case.shapes.state_elements() + 2 * case.other_elements)
        return {
            ADAMW: (adamw, adamw),
            SIXTEEN_BIT: (sixteen, sixteen),
            EIGHT_BIT: (state.held - state.bases + plain_bases, state.codes - state.basis_codes + plain_bases),
            HELD.format(case.basis_bits): (state.held, state.codes),
        }


ADAMW = "AdamW, BF16"
SIXTEEN_BIT = "GaLore, BF16 (by shapes)"
EIGHT_BIT = "8-bit moments, BF16 bases"
HELD = "8-bit moments, {}-bit bases, held"


def bars(outcome: Outcome) -> list[Bar]:
    """Return the figures that have bars in this case."""
    case, full = outcome.case, Case.of_preset(**_chosen(outcome.case))
    if case != full or (case.tokens, case.gradients) != (256, "fused"):
        return []
    kept = []
    kind = (case.weight_bits, case.basis_bits, case.checkpointing)
    peaks = {(16, 8, False): 20.5, (8, 4, True): 13.0}
    if kind in peaks and len(outcome.steps) >= 3:
        what = "peak of the process, GiB"
        kept.append(Bar(what=what, value=outcome.peak_bytes / GIB, at_most=peaks[kind]))
    if outcome.floor is not None and kind == (16, 8, False) and len(outcome.steps) > 1:
        ratio = outcome.ordinary_s / outcome.floor.total_s
        kept.append(Bar(what="ordinary step / the floor", value=ratio, at_most=1.3))
    kept.append(Bar(what="first renewal of all layers, min", value=outcome.steps[0].renewal_s / 60, at_most=15.0))
    states = outcome.states_bytes()
    limits = {SIXTEEN_BIT: 0.35, EIGHT_BIT: 0.215}
    if case.basis_bits == 8:
        limits[HELD.format(8)] = 0.178
    for name, at_most in limits.items():
        what = f"state of {name} / AdamW's"
        kept.append(Bar(what=what, value=states[name][0] / states[ADAMW][0], at_most=at_most))
    return kept


def _chosen(case: Case) -> dict[str, Any]:
    names = ("tokens", "gradients", "basis_bits", "weight_bits", "checkpointing", "learning_rate")
    return {name: getattr(case, name) for name in names}


def tables(outcome: Outcome) -> Group:
    """Return all as tables that fit 80 columns."""
    tables = [_steps_table(outcome), _memory_table(outcome), _states_table(outcome)]
    if outcome.floor is not None:
        tables.append(_floor_table(outcome, outcome.floor))
    return Group(*tables)


def _table(heading: str, *columns: str) -> Table:
    made = Table(title=heading, pad_edge=False, collapse_padding=True)
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", no_wrap=True)
    return made


def title(case: Case) -> str:
    """Name what was trained."""
    recomputed = ", recomputing activations" if case.checkpointing else ""
    return (
        f"LLaMA {case.hidden} wide, {case.layers} layers, {case.weight_bits}-bit weights, {case.basis_bits}-bit bases, "
        f"rank {case.rank}, {case.gradients} gradients, {case.tokens} tokens{recomputed}"
    )


def _steps_table(outcome: Outcome) -> Table:
    made = _table(
        title(outcome.case), "step", "loss", "forward\ns", "backward\ns", "renewal\ns", "optimizer\ns", "all\ns", "GiB"
    )
    for number, step in enumerate(outcome.steps, 1):
        parts_s = (step.forward_s, step.backward_s, step.renewal_s, step.optimizer_s, step.ordinary_s + step.renewal_s)
        made.add_row(
            str(number),
            f"{step.loss:.4f}",
            *(f"{seconds:.2f}" for seconds in parts_s),
            f"{step.peak_bytes / GIB:.2f}",
        )
    made.caption = (
        f"GiB: the peak of the whole process in the step. Making the weights took {outcome.building_s:.0f} s and "
        f"{outcome.building_bytes / GIB:.2f} GiB. Optimizer: all that applies gradients, but for finding bases."
    )
    return made


def _memory_table(outcome: Outcome) -> Table:
    made = _table("Memory at the peak", "kind", "GiB")
    for kind, nbytes in outcome.kinds_bytes().items():
        made.add_row(kind, f"{nbytes / GIB:.2f}")
    made.add_section()
    made.add_row("the whole process", f"{outcome.highest.peak_bytes / GIB:.2f}")
    return made


def _states_table(outcome: Outcome) -> Table:
    made = _table("Optimizer state", "", "GB", "smaller", "codes\nalone, GB", "smaller")
    states = outcome.states_bytes()
    for name, sizes in states.items():
        cells = [(f"{size / GB:.2f}", f"{1 - size / states[ADAMW][0]:.1%}") for size in sizes]
        made.add_row(name, *(cell for pair in cells for cell in pair))
    return made


def _floor_table(outcome: Outcome, floor: Floor) -> Table:
    steps = outcome.steps[1:] or outcome.steps
    ours = {name: median(getattr(step, name) for step in steps) for name in ("fold_s", "inner_s", "other_s")}
    passing_s = median(step.forward_s + step.backward_s for step in steps)
    made = _table("An ordinary step, seconds", "", "ours", "floor")
    made.add_row("forward, backward", f"{passing_s:.2f}", f"{floor.pass_s:.2f}")
    made.add_row("projecting, if not in the backward", f"{ours['other_s']:.2f}", f"{floor.project_s:.2f}")
    made.add_row("projecting back into the weights", f"{ours['fold_s']:.2f}", f"{floor.fold_s:.2f}")
    made.add_row("the optimizer inside", f"{ours['inner_s']:.2f}", f"{floor.inner_s:.2f}")
    made.add_section()
    made.add_row("all", f"{outcome.ordinary_s:.2f}", f"{floor.total_s:.2f}")
    made.caption = f"Ours is {outcome.ordinary_s / floor.total_s:.2f} of the floor, in which all is in bfloat16."
    return made


def record(outcome: Outcome) -> dict[str, Any]:
    """Return every figure as JSON, in seconds and bytes."""
    floor = None if outcome.floor is None else {**asdict(outcome.floor), "total_s": outcome.floor.total_s}
    return {
        **asdict(outcome),
        "floor": floor,
        "ordinary_s": outcome.ordinary_s,
        "peak_bytes": outcome.peak_bytes,
        "kinds_bytes": outcome.kinds_bytes(),
        "states_bytes": {
            name: {"held": held, "codes": codes} for name, (held, codes) in outcome.states_bytes().items()
        },
        "bars": [{**asdict(bar), "kept": bar.kept} for bar in bars(outcome)],
    }


def draw(outcome: Outcome, path: Path) -> None:
    """Draw the seconds of every step, beside the floor, and what the peak consists of; save the picture."""
    import matplotlib.pyplot as plt

    figure, (times, memory) = plt.subplots(1, 2, figsize=(9, 4), width_ratios=(2, 1), layout="constrained")
    names = [f"step {number}" for number in range(1, len(outcome.steps) + 1)]
    parts: dict[str, list[float]] = {
        "forward": [step.forward_s for step in outcome.steps],
        "backward": [step.backward_s for step in outcome.steps],
        "optimizer": [step.optimizer_s for step in outcome.steps],
        "renewal": [step.renewal_s for step in outcome.steps],
    }
    if outcome.floor is not None:
        names.append("floor of a\nlater step")
        floor = outcome.floor
        for part, seconds in (("forward", 0.0), ("backward", floor.pass_s), ("renewal", 0.0)):
            parts[part].append(seconds)
        parts["optimizer"].append(floor.total_s - floor.pass_s)
    _stack(times, names, parts)
    times.set_ylabel("seconds")
    _stack(memory, ["peak"], {kind: [nbytes / GIB] for kind, nbytes in outcome.kinds_bytes().items()})
    memory.set_ylabel("memory of the process, GiB")
    figure.suptitle(title(outcome.case), fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _stack(axis: Any, names: list[str], parts: dict[str, Iterable[float]] | dict[str, list[float]]) -> None:
    bottoms = [0.0] * len(names)
    for part, heights in parts.items():
        axis.bar(names, list(heights), bottom=bottoms, label=part)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axis.margins(x=0.2)
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
