"""Training steps of LLaMA-7B on a CPU, in less than 24 GiB: how long they take, what memory, and of what kind.

    python -m benchmarks.llama_7b                                # 8-bit GaLore, 8-bit bases, bfloat16 weights
    python -m benchmarks.llama_7b --basis-bits 4 --weight-bits 8 --gradient-checkpointing
    python -m benchmarks.llama_7b --layers 2 --plot steps.png    # two of its layers, to try

The model is the preset llama-7b, 6.7 billion parameters, with random weights that are made layer by layer. It is
trained on one piece of real text, the same in every step, so that its loss must fall. Every basis is found in the first
step. The C library has to give freed memory back at once, so that the peak is what the steps need at a time.
"""

import argparse
import gc
import time
from dataclasses import replace

from rich.console import Console

from benchmarks.common import command
from benchmarks.common.memory import GIB, Footprint, give_back_at_once, stored_bytes
from benchmarks.common.methods import Method
from benchmarks.common.report import Report
from benchmarks.common.sizes import LLAMA
from benchmarks.llama_7b import floor as floors
from benchmarks.llama_7b import report
from benchmarks.llama_7b.model import TrainingCase, build_model
from benchmarks.llama_7b.steps import Steps
from galore_torch.optim import state_bytes


def measure(case: TrainingCase, steps: int, floor_rounds: int, messages: Console) -> report.TrainingResult:
    """Build the model, train it for some steps and time the floor, unless its parts are to be timed 0 times."""
    give_back_at_once()
    footprint = Footprint("cpu")
    with command.Phases(messages) as phases:
        phases.begin("making the weights", case.size.layers)
        start_s = time.perf_counter()
        model = build_model(case, phases.count)
        building_s, building_bytes = time.perf_counter() - start_s, footprint.base_bytes + footprint.peak_bytes()
        optimizer = case.method.build_over(model, case.size, lr=case.learning_rate)
        training, taken = Steps(model, optimizer, case, footprint, phases.count), []
        for number in range(1, steps + 1):
            what = "finding every basis" if number == 1 else "training"
            phases.begin(f"step {number} of {steps}: {what}", len(list(model.parameters())))
            step = training.step()
            taken.append(step)
            messages.print(
                f"step {number}: loss {step.loss:.4f}, {step.ordinary_s:.1f} s and {step.renewal_s:.1f} s for "
                f"{step.renewed} bases, {step.peak_bytes / GIB:.2f} GiB",
                highlight=False,
            )
        training.close()
        state = report.State.of(optimizer, state_bytes(optimizer))
        del optimizer, training  # their memory is the floor's now
        gc.collect()
        floor = None
        if floor_rounds:
            phases.begin("timing the floor", floors.parts(case) * floor_rounds)
            floor = floors.measure(model, case, floor_rounds, phases.count)
    return report.TrainingResult(
        case=case,
        steps=taken,
        base_bytes=footprint.base_bytes,
        building_s=building_s,
        building_bytes=building_bytes,
        weight_bytes=stored_bytes([*model.parameters(), *model.buffers()]),
        state=state,
        floor=floor,
    )


def run(given: argparse.Namespace, messages: Console) -> Report:
    """Measure what the command line asks for."""
    size = LLAMA["7b"]
    size = replace(size, layers=given.layers or size.layers, rank=given.rank or size.rank, sequence=given.tokens)
    method = Method(
        optimizer="GaLoreAdamW8bit",
        gradients=given.gradients,
        update="backward",
        basis_bits=given.basis_bits,
        weight_bits=given.weight_bits,
        recomputes=given.gradient_checkpointing,
    )
    case = TrainingCase(size=size, method=method, learning_rate=given.learning_rate)
    return report.report(measure(case, given.steps, given.floor_rounds, messages))


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
