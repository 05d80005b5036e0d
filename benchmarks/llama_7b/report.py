"""What the LLaMA-7B benchmark says: time, memory and optimizer state as tables, its bars, JSON and panels."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from benchmarks.common.measuring import GIB, stored_bytes
from benchmarks.common.report import Bar, Report, Sheet, judged
from benchmarks.common.training import Training
from galore_torch.optim import state_bytes

GB = 1e9
PARTS = {
    "forward_s": "forward",
    "backward_s": "backward",  # without what follows
    "renewal_s": "renewal",  # finding new bases
    "inner_s": "inside",  # the optimizer inside, on coordinates, embeddings, head and norms
    "fold_s": "back",  # projecting the coordinates back into the weights
    "other_s": "other",  # all else that applies gradients: projecting full ones, checks, reading bases in few bits
}
"""The parts of a step, and what tables call them."""
ORDINARY = {
    "forward_s": "forward",
    "backward_s": "backward",
    "inner_s": "the optimizer inside",
    "fold_s": "projecting back into the weights",
    "other_s": "projecting, if not in the backward",
}
"""The parts that an ordinary step has, and its floor, in words."""
ADAMW = "AdamW, BF16"
SIXTEEN_BIT = "GaLore, BF16 (by shapes)"
EIGHT_BIT = "8-bit moments, BF16 bases"
HELD = "8-bit moments, {}-bit bases, held"
Step = Mapping[str, float]


def state_of(optimizer: Optimizer) -> dict[str, tuple[int, int]]:
    """Return the bytes of an optimizer's "bases" and "moments" from its real tensors: with scales, and codes alone."""
    bases, inner = ([_tensors(one.get(key)) for one in optimizer.state.values()] for key in ("basis", "inner"))
    bases_bytes = sum(map(stored_bytes, bases))
    return {
        "bases": (bases_bytes, sum(map(_codes_bytes, bases))),
        "moments": (state_bytes(optimizer) - bases_bytes, sum(map(_codes_bytes, inner))),
    }


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _codes_bytes(tensors: list[Tensor]) -> int:
    """The bytes of one weight's codes; of all its numbers where it has no codes."""
    return stored_bytes([tensor for tensor in tensors if tensor.dtype in (torch.uint8, torch.int8)] or tensors)


@dataclass
class Outcome:
    """All that was measured."""

    case: Training  # what ran
    building: Mapping[str, float]  # of the model: its seconds, highest_bytes of the process, and base_bytes before it
    steps: list[dict[str, float]]  # in order; the first finds every basis
    weight_bytes: int  # of the model
    state: Mapping[str, tuple[int, int]]  # of the optimizer after the last step, see `state_of`
    floor_s: Mapping[str, float] | None = None  # seconds that no ordinary step can do without, by part

    @property
    def highest(self) -> Step:
        """The step that took the most memory."""
        return max(self.steps, key=lambda step: step["peak_bytes"])

    @property
    def peak_bytes(self) -> float:
        """The most memory that the process took."""
        return max(self.building["highest_bytes"], self.highest["peak_bytes"])

    def ordinary_s(self) -> dict[str, float]:
        """Return the seconds of an ordinary step by part: medians of the steps after the first."""
        return {part: median(step[part] for step in self.steps[1:] or self.steps) for part in ORDINARY}

    @property
    def over_floor(self) -> float:
        """An ordinary step over its floor, where that was timed."""
        return sum(self.ordinary_s().values()) / sum((self.floor_s or {}).values())

    def kinds_bytes(self) -> dict[str, float]:
        """Return what the peak consists of."""
        kinds = {
            "weights": self.weight_bytes,
            **{kind: held for kind, (held, _) in self.state.items()},
            "activations": self.highest["activation_bytes"],
            "largest gradient": self.highest["gradient_bytes"],
            "the process itself": self.building["base_bytes"],
        }
        return {**kinds, "the rest": self.highest["peak_bytes"] - sum(kinds.values())}

    def states_bytes(self) -> dict[str, tuple[int, int]]:
        """Return the optimizer state by method: with scales, and codes alone."""
        size = self.case.size
        adamw = 2 * 2 * (sum(m * n for m, n in size.weights) + size.other_elements)
        sixteen = 2 * (size.state_elements() + 2 * size.other_elements)
        (bases, basis_codes), (moments, moment_codes) = self.state["bases"], self.state["moments"]
        return {
            ADAMW: (adamw, adamw),
            SIXTEEN_BIT: (sixteen, sixteen),
            EIGHT_BIT: (moments + 2 * size.basis_elements, moment_codes + 2 * size.basis_elements),
            HELD.format(self.case.method.basis_bits): (moments + bases, moment_codes + basis_codes),
        }


def report(outcome: Outcome) -> Report:
    """Return all of it, every figure as JSON too, in seconds and bytes."""
    made = title(outcome.case)
    return Report(title=made, record=asdict(outcome), sheets=sheets(outcome), bars=bars(outcome))


def title(case: Training) -> str:
    """Return what is trained, in words."""
    method = case.method
    bits = f"{method.weight_bits}-bit weights, {method.basis_bits}-bit bases, {method.gradients} gradients"
    return f"{case.title}, {bits}{', recomputing activations' * method.recomputes}"


def bars(outcome: Outcome) -> list[Bar]:
    """Return the figures that have bars in this case."""
    states = outcome.states_bytes()
    figures = {f"state of {name} / AdamW's": held / states[ADAMW][0] for name, (held, _) in states.items()}
    figures["first renewal of all layers, min"] = outcome.steps[0]["renewal_s"] / 60
    if len(outcome.steps) >= 3:
        figures["peak of the process, GiB"] = outcome.peak_bytes / GIB
    if outcome.floor_s and len(outcome.steps) > 1:
        figures["ordinary step / the floor"] = outcome.over_floor
    return judged("llama_7b", outcome.case.case(), figures)


def sheets(outcome: Outcome) -> list[Sheet]:
    """Return all as tables that fit 80 columns: the steps, memory, the optimizer's state, and the floor."""
    steps: dict[str, dict[str, Any]] = {}
    for number, step in enumerate(outcome.steps, 1):
        seconds = {f"{words}, s": step[part] for part, words in PARTS.items()}
        last = {"all, s": sum(seconds.values()), "GiB": step["peak_bytes"] / GIB}
        steps[f"step {number}"] = {"loss": f"{step['loss']:.4f}", **seconds, **last}
    caption = (
        "Inside: the optimizer on coordinates; back: projecting them into the weights. GiB: the peak of the process in "
        f"the step. Making the weights took {outcome.building['seconds']:.0f} s and "
        f"{outcome.building['highest_bytes'] / GIB:.2f} GiB."
    )
    memory = {**outcome.kinds_bytes(), "the whole process": outcome.highest["peak_bytes"]}
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
    kinds = {kind: {"GiB": nbytes / GIB} for kind, nbytes in memory.items()}
    made = [
        Sheet(
            title=title(outcome.case),
            rows=steps,
            caption=caption,
            drawn=[f"{words}, s" for words in PARTS.values()],
            unit="seconds",
        ),
        Sheet(title="Memory at the peak", rows=kinds, last=1, drawn=("GiB",), unit="memory of the process, GiB"),
        Sheet(title="Optimizer state", rows=state),
    ]
    if outcome.floor_s:
        both = {"ours": outcome.ordinary_s(), "floor": outcome.floor_s}
        rows = {words: {who: of[part] for who, of in both.items()} for part, words in ORDINARY.items()}
        rows["all"] = {who: sum(seconds.values()) for who, seconds in both.items()}
        caption = f"Ours is {outcome.over_floor:.2f} of the floor, in which all is in bfloat16."
        made.append(Sheet(title="An ordinary step, seconds", rows=rows, caption=caption, last=1))
    return made
