"""Training steps of LLaMA-7B on a CPU, in less than 24 GiB: how long they take, what memory, and of what kind.

    python -m benchmarks.llama_7b                                # 8-bit GaLore, 8-bit bases, bfloat16 weights
    python -m benchmarks.llama_7b --basis-bits 4 --weight-bits 8 --gradient-checkpointing
    python -m benchmarks.llama_7b --layers 2 --plot steps.png    # two of its layers, to try

The model is the preset llama-7b, 6.7 billion parameters, with random weights that are made layer by layer. It is
trained on one piece of real text, the same in every step, so that its loss must fall. Every basis is found in the first
step. The C library has to give freed memory back at once, so that the peak is what the steps need at a time.

The floor is what an ordinary step cannot do without, bare, in bfloat16 and in the same process: a forward and a
backward that drops every gradient; the products that project gradients and project back into weights; and bitsandbytes'
AdamW on coordinates and embeddings. One layer's are timed, and counted as often as there are layers.
"""

import argparse
import gc
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.common import command, measuring
from benchmarks.common.cases import Trained, Training
from benchmarks.common.floor import layered_floor_s
from benchmarks.common.measuring import GIB
from benchmarks.common.methods import METHODS
from benchmarks.common.report import Bar, Report, Sheet, judged
from benchmarks.common.sizes import LLAMA
from galore_torch import GaLore, quantize_weights
from galore_torch.optim import chunks, state_bytes
from galore_torch.optim.rule import Rule
from galore_torch.optim.trained_weight import TrainedWeight
from galore_torch.training.pretrain.model import fresh_llama
from galore_torch.training.run.base_model import recompute_activations

GB = 1e9
PARTS = {
    "forward_s": ("forward", "forward"),
    "backward_s": ("backward", "backward"),  # without what follows
    "renewal_s": ("renewal", ""),  # finding new bases
    "inner_s": ("inside", "the optimizer inside"),  # on coordinates, embeddings, head and norms
    "fold_s": ("back", "projecting back into the weights"),
    "other_s": ("other", "projecting, if not in the backward"),  # and checks, and reading bases in few bits
}
"""The parts of a step: what tables of steps call them, and those of an ordinary step, which renews nothing."""
ORDINARY = {part: words for part, (_, words) in PARTS.items() if words}
APPLYING = (GaLore, "_apply")
INSIDE = {"renewal_s": (TrainedWeight, "renew"), "inner_s": (Rule, "step"), "fold_s": (chunks, "fold_all")}
"""What is timed of applying gradients, by the methods and functions that do it."""


def real_text(tokens: int) -> Tensor:
    """Return the beginning of one of Python's own sources, a byte a token: (1, tokens).

    Raises:
        ValueError: More tokens than it has.
    """
    source = Path(argparse.__file__).read_bytes()
    if tokens > len(source):
        raise ValueError(f"tokens is {tokens}, and there are {len(source):,}; ask for fewer")
    return torch.tensor([list(source[:tokens])])


class Watched(Trained):
    """A model under training whose steps are taken apart; `advance` is called for each layer made and each gradient."""

    def __init__(self, case: Training, advance: Callable[[], None] = lambda: None) -> None:
        self._advance = advance
        self._largest_bytes = 0
        super().__init__(case)

    def build(self) -> LlamaForCausalLM:
        """Return the model, no more than a layer of which is ever there unquantized; `building` is what that took."""
        before, start_s = measuring.Footprint("cpu"), time.perf_counter()
        torch.manual_seed(0)
        seeds = iter(range(self.training.size.layers))

        def made(module: nn.Module) -> None:
            if isinstance(module, LlamaDecoderLayer):
                if self.training.method.weight_bits == 8:
                    quantize_weights(module, target_modules=("attn", "mlp"), seed=next(seeds))
                self._advance()

        model = fresh_llama(self.training.size.architecture(), self.training.torch_dtype, made)
        if self.training.method.recomputes:
            recompute_activations(model)
        for weight in model.parameters():  # before the hooks of `attach`, which free the gradients
            weight.register_post_accumulate_grad_hook(self._complete)  # type: ignore[no-untyped-call]
        seconds, highest_bytes = time.perf_counter() - start_s, before.highest_bytes()
        self.building = {"base_bytes": before.base_bytes, "seconds": seconds, "highest_bytes": highest_bytes}
        return model

    def _complete(self, weight: Tensor) -> None:
        self._largest_bytes = max(self._largest_bytes, measuring.stored_bytes([weight.grad]))
        self._advance()

    def draw(self) -> Tensor:
        """Return the text, the same for every step."""
        return real_text(self.training.tokens)

    def backward(self, ids: Tensor) -> None:
        """Go forward and backward, and note what the forward comes to."""
        before_bytes, start_s = self.footprint.taken_bytes(), time.perf_counter()
        loss = self.model(input_ids=ids, labels=ids).loss
        forward_s, grown_bytes = time.perf_counter() - start_s, self.footprint.taken_bytes() - before_bytes
        self._forward = {"loss": float(loss.detach()), "forward_s": forward_s, "activation_bytes": max(0, grown_bytes)}
        loss.backward()

    def step(self) -> dict[str, float]:
        """Take one step.

        Returns:
            `loss`, before the step, in nats per token; seconds of its `PARTS`; `renewed`, how many bases were found;
            `peak_bytes`, the most memory that the process took; `activation_bytes`, by how much the forward let it
            grow; and `gradient_bytes`, the largest gradient that there was at a time.
        """
        self._largest_bytes = 0
        with ExitStack() as stack:
            applying = stack.enter_context(measuring.timed_calls(*APPLYING))
            inside = [stack.enter_context(measuring.timed_calls(*place, within=applying)) for place in INSIDE.values()]
            step_s = super().step()["step_s"]
        return {
            **self._forward,
            "backward_s": step_s - self._forward["forward_s"] - applying.seconds,
            **{name: calls.seconds for name, calls in zip(INSIDE, inside, strict=True)},
            "other_s": applying.seconds - sum(calls.seconds for calls in inside),
            "renewed": inside[0].count,
            "peak_bytes": self.footprint.highest_bytes(),
            "gradient_bytes": self._largest_bytes,
        }


def state_of(optimizer: Optimizer) -> dict[str, tuple[int, int]]:
    """Return the bytes of an optimizer's "bases" and "moments" from its real tensors: with scales, and codes alone."""
    weights = list(optimizer.state.values())
    bases, inner = ([_tensors(one.get(key)) for one in weights] for key in ("basis", "inner"))
    bases_bytes = sum(map(measuring.stored_bytes, bases))
    return {
        "bases": (bases_bytes, sum(map(_codes_bytes, bases))),
        "moments": (state_bytes(optimizer) - bases_bytes, sum(map(_codes_bytes, inner))),
    }


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _codes_bytes(tensors: list[Tensor]) -> int:
    """The bytes of one weight's codes; of all its numbers where it has no codes."""
    return measuring.stored_bytes(
        [tensor for tensor in tensors if tensor.dtype in (torch.uint8, torch.int8)] or tensors
    )


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
    def highest(self) -> Mapping[str, float]:
        """The step that took the most memory."""
        return max(self.steps, key=lambda step: step["peak_bytes"])

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
        """Return the optimizer state by method, AdamW's first: with scales, and codes alone."""
        size = self.case.size
        adamw = 2 * 2 * (sum(m * n for m, n in size.weights) + size.other_elements)
        sixteen = 2 * (size.state_elements() + 2 * size.other_elements)
        (bases, basis_codes), (moments, moment_codes) = self.state["bases"], self.state["moments"]
        return {
            "AdamW, BF16": (adamw, adamw),
            "GaLore, BF16 (by shapes)": (sixteen, sixteen),
            "8-bit moments, BF16 bases": (moments + 2 * size.basis_elements, moment_codes + 2 * size.basis_elements),
            f"8-bit moments, {self.case.method.basis_bits}-bit bases, held": (
                moments + bases,
                moment_codes + basis_codes,
            ),
        }

    def bars(self) -> list[Bar]:
        """Return the figures that have bars in this case."""
        states = self.states_bytes()
        (adamw, _), *_ = states.values()
        figures = {f"state of {name} / AdamW's": held / adamw for name, (held, _) in states.items()}
        figures["first renewal of all layers, min"] = self.steps[0]["renewal_s"] / 60
        if len(self.steps) >= 3:
            figures["peak of the process, GiB"] = max(self.building["highest_bytes"], self.highest["peak_bytes"]) / GIB
        if self.floor_s and len(self.steps) > 1:
            figures["ordinary step / the floor"] = self.over_floor
        return judged("llama_7b", self.case.case(), figures)

    def report(self) -> Report:
        """Return all as tables that fit 80 columns: the steps, memory, the optimizer's state, and the floor."""
        method, building = self.case.method, self.building
        title = (
            f"{self.case.title}, {method.weight_bits}-bit weights, {method.basis_bits}-bit bases, "
            f"{method.gradients} gradients{', recomputing activations' * method.recomputes}"
        )
        steps: dict[str, dict[str, Any]] = {}
        for number, step in enumerate(self.steps, 1):
            seconds = {f"{words}, s": step[part] for part, (words, _) in PARTS.items()}
            last = {"all, s": sum(seconds.values()), "GiB": step["peak_bytes"] / GIB}
            steps[f"step {number}"] = {"loss": f"{step['loss']:.4f}", **seconds, **last}
        caption = (
            "Inside: the optimizer on coordinates; back: projecting them into the weights. GiB: the peak of the "
            f"process in the step. Making the weights took {building['seconds']:.0f} s and "
            f"{building['highest_bytes'] / GIB:.2f} GiB."
        )
        memory = {**self.kinds_bytes(), "the whole process": self.highest["peak_bytes"]}
        kinds = {kind: {"GiB": nbytes / GIB} for kind, nbytes in memory.items()}
        (adamw, _), *_ = self.states_bytes().values()
        state = {
            name: {
                f"{of}{what}": figure
                for of, nbytes in (("", held), ("codes alone, ", codes))
                for what, figure in (("GB", nbytes / GB), ("smaller", f"{1 - nbytes / adamw:.1%}"))
            }
            for name, (held, codes) in self.states_bytes().items()
        }
        drawn = [f"{words}, s" for words, _ in PARTS.values()]
        sheets = [
            Sheet(title=title, rows=steps, caption=caption, drawn=drawn, unit="seconds"),
            Sheet(title="Memory at the peak", rows=kinds, last=1, drawn=("GiB",), unit="memory of the process, GiB"),
            Sheet(title="Optimizer state", rows=state),
        ]
        if self.floor_s:
            both = {"ours": self.ordinary_s(), "floor": self.floor_s}
            rows = {words: {who: of[part] for who, of in both.items()} for part, words in ORDINARY.items()}
            rows["all"] = {who: sum(seconds.values()) for who, seconds in both.items()}
            caption = f"Ours is {self.over_floor:.2f} of the floor, in which all is in bfloat16."
            sheets.append(Sheet(title="An ordinary step, seconds", rows=rows, caption=caption, last=1))
        return Report(title=title, record=asdict(self), sheets=sheets, bars=self.bars())


def measure(case: Training, steps: int, floor_rounds: int, messages: Console) -> Outcome:
    """Build the model, train it for some steps and time the floor, unless its parts are to be timed 0 times."""
    measuring.give_back_at_once()
    with command.Phases(messages) as phases:
        phases.begin("making the weights", case.size.layers)
        trained, taken = Watched(case, phases.count), []
        for number in range(1, steps + 1):
            what = "finding every basis" if number == 1 else "training"
            phases.begin(f"step {number} of {steps}: {what}", len(list(trained.model.parameters())))
            taken.append(step := trained.step())
            messages.print(
                f"step {number}: loss {step['loss']:.4f}, {sum(step[part] for part in ORDINARY):.1f} s and "
                f"{step['renewal_s']:.1f} s for {step['renewed']} bases, {step['peak_bytes'] / GIB:.2f} GiB",
                highlight=False,
            )
        weight_bytes = measuring.stored_bytes([*trained.model.parameters(), *trained.model.buffers()])
        outcome = Outcome(case, trained.building, taken, weight_bytes, state_of(trained.optimizer))
        del trained  # its memory is the floor's now
        gc.collect()
        if floor_rounds:
            phases.begin("timing the floor", 1 + floor_rounds)
            outcome.floor_s = layered_floor_s(case, real_text(case.tokens), floor_rounds, phases.count)
    return outcome


def run(given: argparse.Namespace, messages: Console) -> Report:
    """Measure what the command line asks for."""
    size, name = LLAMA["7b"], f"galore-8bit-per-layer/{given.gradients}"
    size = replace(size, layers=given.layers or size.layers, rank=given.rank or size.rank, sequence=given.tokens)
    bits = {"basis_bits": given.basis_bits, "weight_bits": given.weight_bits}
    case = Training(
        name=name,
        method=replace(METHODS[name], **bits, recomputes=given.gradient_checkpointing),
        size=size,
        tokens=given.tokens,
        batch=1,
        learning_rate=given.learning_rate,
        threads=given.threads,
    )
    return measure(case, given.steps, given.floor_rounds, messages).report()


def main(arguments: list[str] | None = None) -> None:
    """Train LLaMA-7B for some steps on this machine's CPU."""
    made, number = command.parser(__doc__, "benchmarks.llama_7b"), command.at_least
    add = made.add_argument
    add("--steps", type=number(1), default=3, help="steps; the first finds every basis (3)")
    add("--gradients", choices=["full", "fused"], default="fused", help="how gradients are formed (fused)")
    add("--basis-bits", type=int, choices=[16, 8, 4], default=8, help="in what bases are kept (8)")
    add("--weight-bits", type=int, choices=[16, 8], default=16, help="in what matrices are kept (16)")
    add("--gradient-checkpointing", action="store_true", help="let the backward compute activations again")
    add("--rank", type=number(1), help="left out, the preset's")
    add("--tokens", type=number(2), default=256, help="tokens a step (256)")
    add("--layers", type=number(1), help="left out, all; fewer to try")
    add("--learning-rate", type=float, default=1e-3, help="of every weight, constant (1e-3)")
    add("--floor-rounds", type=number(0), default=2, help="how often the floor's parts are timed; 0: not (2)")
    command.run(made.parse_args(arguments), run)


if __name__ == "__main__":
    main()
