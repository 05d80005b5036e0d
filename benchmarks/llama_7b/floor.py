"""What an ordinary step of the LLaMA-7B benchmark cannot do without, each part bare and timed in the same process.

* a forward and a backward that forms every gradient and drops it;
* the products that project gradients, in the form in which the case has them, and those that project back, accumulated
  into weights: one layer's, times the number of layers;
* bitsandbytes' AdamW on tensors of one layer's coordinates, times the number of layers, and on the embeddings, twice.

All is in bfloat16, whatever the case keeps in fewer bits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.common.floor import Bare, weights_with_gradients
from benchmarks.common.timing import Call, seconds_of
from benchmarks.llama_7b.model import Advance, TrainingCase, real_text

SLICE_ELEMENTS = 2**22
"""What bitsandbytes gets at a time: on a CPU it copies all that it is given into float32."""


def parts(case: TrainingCase) -> int:
    """Return how many parts are timed."""
    return 5 if case.method.weight_bits == 16 else 6


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Seconds of the parts, for the whole model."""

    pass_s: float  # forward and backward
    project_s: float  # projecting gradients
    fold_s: float  # projecting coordinates back into the weights
    inner_s: float  # the optimizer inside

    @property
    def total_s(self) -> float:
        """Seconds of all parts."""
        return self.pass_s + self.project_s + self.fold_s + self.inner_s


def measure(model: LlamaForCausalLM, case: TrainingCase, rounds: int, advance: Advance = lambda: None) -> Floor:
    """Time the parts of a case, each once for itself and then in so many rounds, whose median counts.

    The model is the one that has been trained, with nothing attached any more; `advance` is called
    `parts(case) * rounds` times.
    """
    size, layers = case.size, case.size.layers

    def seconds(part: Call) -> float:
        part()
        times_s = []
        for _ in range(rounds):
            times_s.append(seconds_of(part, "cpu"))
            advance()
        return median(times_s)

    if case.method.weight_bits == 16:
        pass_s = seconds(_pass(model, case))
    else:  # a quantized model would not pass in bfloat16: one layer in bfloat16 stands for all
        model = replace(size, layers=1).model(torch.bfloat16)
        one_s = seconds(_pass(model, case))
        model.model.layers = nn.ModuleList()
        none_s = seconds(_pass(model, case))
        pass_s = none_s + layers * (one_s - none_s)
    bare = Bare(weights_with_gradients(size.weights[:7], torch.bfloat16), size.rank, size.sequence)
    layer_s = seconds(_adamw_step([coordinate.numel() for coordinate in bare.coordinates]))
    return Floor(
        pass_s=pass_s,
        project_s=layers * seconds(bare.project_fused if case.method.gradients == "fused" else bare.project),
        fold_s=layers * seconds(bare.fold),
        inner_s=layers * layer_s + 2 * seconds(_adamw_step([size.vocabulary * size.hidden])),
    )


def _pass(model: LlamaForCausalLM, case: TrainingCase) -> Call:
    """A forward and a backward that drops every gradient."""
    ids = real_text(case.size)

    def drop(weight: Tensor) -> None:
        weight.grad = None

    def forward_and_backward() -> None:
        hooks = [weight.register_post_accumulate_grad_hook(drop) for weight in model.parameters()]  # type: ignore[no-untyped-call]
        model(input_ids=ids, labels=ids).loss.backward()
        for hook in hooks:
            hook.remove()

    return forward_and_backward


def _adamw_step(sizes: list[int]) -> Callable[[], object]:
    """A step of bitsandbytes' AdamW on tensors of these many elements, in slices."""
    from bitsandbytes.optim.adamw import AdamW8bit

    wholes = [torch.zeros(size, dtype=torch.bfloat16) for size in sizes]
    parameters = [nn.Parameter(part) for whole in wholes for part in torch.split(whole, SLICE_ELEMENTS)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    step: Callable[[], object] = AdamW8bit(parameters, lr=1e-4).step  # type: ignore[no-untyped-call]
    return step
