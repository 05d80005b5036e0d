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
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.common import command
from benchmarks.common.floor import Bare, weights_with_gradients
from benchmarks.common.measuring import (
    GIB,
    Call,
    Footprint,
    give_back_at_once,
    seconds_by_part,
    stored_bytes,
    timed_calls,
)
from benchmarks.common.methods import BUILDERS, LEARNING_RATE, METHODS
from benchmarks.common.report import Report
from benchmarks.common.sizes import LLAMA, Llama
from benchmarks.common.training import Trained, Training
from benchmarks.llama_7b.report import ORDINARY, Outcome, report, state_of
from galore_torch import GaLore, quantize_weights
from galore_torch.optim import chunks
from galore_torch.optim.rule import Rule
from galore_torch.optim.trained_weight import TrainedWeight
from galore_torch.training.pretrain.model import fresh_llama
from galore_torch.training.run.base_model import recompute_activations

APPLYING = (GaLore, "_apply")
INSIDE = {"renewal_s": (TrainedWeight, "renew"), "inner_s": (Rule, "step"), "fold_s": (chunks, "fold_all")}
"""What is timed of applying gradients, by the methods and functions that do it."""
SLICE_ELEMENTS = 2**22
"""What bitsandbytes gets at a time: on a CPU it copies all that it is given into float32."""


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
    """A model under training whose steps are taken apart.

    Args:
        case: What is trained, and how.
        advance: Called as each layer is made and, in a step, as each gradient is complete.
    """

    def __init__(self, case: Training, advance: Callable[[], None] = lambda: None) -> None:
        self._advance = advance
        self._largest_bytes = 0
        super().__init__(case)

    def build(self) -> LlamaForCausalLM:
        """Return the model, no more than a layer of which is ever there unquantized; `building` is what that took."""
        before, start_s = Footprint("cpu"), time.perf_counter()
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
        self._largest_bytes = max(self._largest_bytes, stored_bytes([weight.grad]))
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
            `loss`, before the step, in nats per token; seconds of its parts, see `report.PARTS`; `renewed`, how many
            bases were found; `peak_bytes`, the most memory that the process took; `activation_bytes`, by how much the
            forward let it grow; and `gradient_bytes`, the largest gradient that there was at a time.
        """
        self._largest_bytes = 0
        with ExitStack() as stack:
            applying = stack.enter_context(timed_calls(*APPLYING))
            inside = [stack.enter_context(timed_calls(*place, within=applying)) for place in INSIDE.values()]
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


def floor_s(case: Training, rounds: int, advance: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Return the seconds of the floor by part of a step, medians of so many rounds after one that nobody counts.

    `advance` is called after each round.
    """
    size, layers, seconds = case.size, case.size.layers, dict[str, list[float]]()
    bare = Bare(weights_with_gradients(size.weights[:7], torch.bfloat16), size.rank, case.tokens)
    parts: dict[str, Call] = {
        **_pass("no layer", replace(size, layers=0)),
        **_pass("one layer", replace(size, layers=1)),
        "project": bare.project_fused if case.method.gradients == "fused" else bare.project,
        "fold": bare.fold,
        "inner": _adamw_step([coordinate.numel() for coordinate in bare.coordinates]),
        "embeddings": _adamw_step([size.vocabulary * size.hidden]),
    }
    for _ in range(1 + rounds):
        for name, value in seconds_by_part(parts).items():
            seconds.setdefault(name, []).append(value)
        advance()
    one = {name: median(values[1:]) for name, values in seconds.items()}
    passes = {
        way: one[f"no layer, {way}"] + layers * max(0.0, one[f"one layer, {way}"] - one[f"no layer, {way}"])
        for way in ("forward_s", "backward_s")
    }
    inner_s = layers * one["inner_s"] + 2 * one["embeddings_s"]
    return {**passes, "inner_s": inner_s, "fold_s": layers * one["fold_s"], "other_s": layers * one["project_s"]}


def _pass(name: str, size: Llama) -> dict[str, Call]:
    """A forward, and a backward that drops every gradient."""
    model, ids = size.model(torch.bfloat16), real_text(size.sequence)
    losses: list[Tensor] = []

    def drop(weight: Tensor) -> None:
        weight.grad = None

    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(drop)  # type: ignore[no-untyped-call]
    return {
        f"{name}, forward": lambda: losses.append(model(input_ids=ids, labels=ids).loss),
        f"{name}, backward": lambda: losses.pop().backward(),  # type: ignore[no-untyped-call]
    }


def _adamw_step(sizes: list[int]) -> Call:
    """A step of bitsandbytes' AdamW on tensors of these many elements, in slices."""
    wholes = [torch.zeros(size, dtype=torch.bfloat16) for size in sizes]
    parameters = [nn.Parameter(part) for whole in wholes for part in torch.split(whole, SLICE_ELEMENTS)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    step: Call = BUILDERS["AdamW8bit"]([{"params": parameters}], LEARNING_RATE).step
    return step


def measure(case: Training, steps: int, floor_rounds: int, messages: Console) -> Outcome:
    """Build the model, train it for some steps and time the floor, unless its parts are to be timed 0 times."""
    give_back_at_once()
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
        weight_bytes = stored_bytes([*trained.model.parameters(), *trained.model.buffers()])
        outcome = Outcome(case, trained.building, taken, weight_bytes, state_of(trained.optimizer))
        del trained  # its memory is the floor's now
        gc.collect()
        if floor_rounds:
            phases.begin("timing the floor", 1 + floor_rounds)
            outcome.floor_s = floor_s(case, floor_rounds, phases.count)
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
    return report(measure(case, given.steps, given.floor_rounds, messages))


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
