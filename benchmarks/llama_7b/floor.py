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

from benchmarks.common.floor import Bare
from benchmarks.common.optimizers import weights_with_gradients
from benchmarks.common.timing import Call, seconds_of
from benchmarks.llama_7b.model import Advance, Case, real_text

SLICE_ELEMENTS = 2**22
"""What bitsandbytes gets at a time: on a CPU it copies all that it is given into float32."""


def parts(case: Case) -> int:
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


def measure(model: LlamaForCausalLM, case: Case, rounds: int, advance: Advance = lambda: None) -> Floor:
    """Time the parts.

    Args:
        model: The one that has been trained; nothing is attached to it any more.
        case: Its shapes.
        rounds: How often each part is timed after once for itself; medians count.
        advance: Called after each measurement, `parts(case) * rounds` times.
    """
    size, layers = case.size, case.size.layers

    def seconds(part: Call) -> float:
        part()
        times_s = []
        for _ in range(rounds):
            times_s.append(seconds_of(part, "cpu"))
            advance()
        return median(times_s)

    def pass_s(model: LlamaForCausalLM) -> float:
        hooks = [weight.register_post_accumulate_grad_hook(_drop) for weight in model.parameters()]  # type: ignore[no-untyped-call]
        ids = real_text(size)

        def there_and_back() -> None:
            model(input_ids=ids, labels=ids).loss.backward()

        taken_s = seconds(there_and_back)
        for hook in hooks:
            hook.remove()
        return taken_s

    if case.method.weight_bits == 16:
        whole_s = pass_s(model)
    else:  # a quantized model would not pass in bfloat16: one layer in bfloat16 stands for all
        model = replace(size, layers=1).model(torch.bfloat16)
        one_s = pass_s(model)
        model.model.layers = nn.ModuleList()
        none_s = pass_s(model)
        whole_s = none_s + layers * (one_s - none_s)
    bare = Bare(weights_with_gradients(size.weights[:7]), size.rank, size.sequence)
    project_s = seconds(bare.project_fused if case.method.gradients == "fused" else bare.project)
    fold_s = seconds(bare.fold)
    layer_s = seconds(_adamw_step([coordinate.numel() for coordinate in bare.coordinates]))
    embeddings_s = seconds(_adamw_step([size.vocabulary * size.hidden]))
    return Floor(
        pass_s=whole_s,
        project_s=layers * project_s,
        fold_s=layers * fold_s,
        inner_s=layers * layer_s + 2 * embeddings_s,
    )


def _drop(weight: Tensor) -> None:
    weight.grad = None


def _adamw_step(sizes: list[int]) -> Callable[[], object]:
    """Return a step of bitsandbytes' AdamW on tensors of these many elements, in slices."""
    from bitsandbytes.optim.adamw import AdamW8bit

    wholes = [torch.zeros(size, dtype=torch.bfloat16) for size in sizes]
    parameters = [nn.Parameter(part) for whole in wholes for part in torch.split(whole, SLICE_ELEMENTS)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    step: Callable[[], object] = AdamW8bit(parameters, lr=1e-4).step  # type: ignore[no-untyped-call]
    return step
