"""What an ordinary step of the LLaMA-7B benchmark cannot do without, each part bare and timed in the same process.

* a forward and a backward that forms every gradient and drops it;
* the products that project gradients, in the form in which the case has them, and those that project back, accumulated
  into weights: one layer's, times the number of layers;
* bitsandbytes' AdamW on tensors of one layer's coordinates, times the number of layers, and on the embeddings, twice.

All is in bfloat16, whatever the case keeps in fewer bits. Shape suffixes: N tokens, m x n a weight, r the rank.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.llama_7b_model import Advance, Case, real_text
from galore_torch.training.model import fresh_llama

SLICE_ELEMENTS = 2**22
"""What bitsandbytes gets at a time: on a CPU it copies all that it is given into float32."""


def parts(case: Case) -> int:
    """Return how many parts are timed."""
    return 5 if case.weight_bits == 16 else 6


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Seconds of the parts, for the whole model.

    Attributes:
        pass_s: Forward and backward.
        project_s: Projecting gradients.
        fold_s: Projecting coordinates back into the weights.
        inner_s: The optimizer inside.
    """

    pass_s: float
    project_s: float
    fold_s: float
    inner_s: float

    @property
    def total_s(self) -> float:
        """Seconds of all parts."""
        return self.pass_s + self.project_s + self.fold_s + self.inner_s


def measure(model: LlamaForCausalLM, case: Case, rounds: int, advance: Advance = lambda: None) -> Floor:
    """Time the parts.

    Args:
        model: The one that has been trained; nothing is attached to it any more.
        case: Its shapes.
        rounds: How often each part is timed; medians count.
        advance: Called after each measurement, `parts(case) * rounds` times.
    """
    seconds = _Seconds(rounds, advance)
    # A quantized model would not pass in bfloat16: one layer in bfloat16 stands for all.
    pass_s = _pass_s(model, case, seconds) if case.weight_bits == 16 else _pass_of_layers_s(case, seconds)
    project_s, fold_s = _products_s(case, seconds)
    return Floor(pass_s=pass_s, project_s=project_s, fold_s=fold_s, inner_s=_inner_s(case, seconds))


class _Seconds:
    """Times a part: once for itself, then the rounds, whose median counts."""

    def __init__(self, rounds: int, advance: Advance) -> None:
        self._rounds, self._advance = rounds, advance

    def of(self, part: Callable[[], object]) -> float:
        part()
        times_s = []
        for _ in range(self._rounds):
            start_s = time.perf_counter()
            part()
            times_s.append(time.perf_counter() - start_s)
            self._advance()
        return median(times_s)


def _pass_s(model: LlamaForCausalLM, case: Case, seconds: _Seconds) -> float:
    ids = real_text(case)

    def drop(weight: Tensor) -> None:
        weight.grad = None

    hooks = [weight.register_post_accumulate_grad_hook(drop) for weight in model.parameters()]  # type: ignore[no-untyped-call]

    def there_and_back() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    taken_s = seconds.of(there_and_back)
    for hook in hooks:
        hook.remove()
    return taken_s


def _pass_of_layers_s(case: Case, seconds: _Seconds) -> float:
    model = fresh_llama(case.architecture(layers=1), torch.bfloat16)
    one_s = _pass_s(model, case, seconds)
    model.model.layers = nn.ModuleList()
    none_s = _pass_s(model, case, seconds)
    return none_s + case.layers * (one_s - none_s)


def _products_s(case: Case, seconds: _Seconds) -> tuple[float, float]:
    """Projecting and projecting back, as `proj_type="std"` does: on the shorter side of each weight."""
    layer = []
    for m, n in case.shapes.weights[:7]:
        tall = m >= n
        image_shape = (m, case.rank) if tall else (case.rank, n)
        shapes = ((min(m, n), case.rank), image_shape, (case.tokens, m), (case.tokens, n))
        basis, image, grad_y, x = (torch.randn(shape, dtype=torch.bfloat16) for shape in shapes)
        layer.append((tall, basis, image, grad_y, x, torch.randn(m, n, dtype=torch.bfloat16)))

    def project() -> None:
        for tall, basis, image, grad_y, x, weight in layer:
            if case.gradients == "full":  # G Q or P^T G; the weight has the gradient's shape
                torch.mm(*((weight, basis) if tall else (basis.mT, weight)), out=image)
            elif tall:
                torch.mm(grad_y.mT, x @ basis, out=image)  # dY^T (X Q)
            else:
                torch.mm((grad_y @ basis).mT, x, out=image)  # (dY P)^T X

    def fold() -> None:
        for tall, basis, image, _, _, weight in layer:
            weight.addmm_(*((image, basis.mT) if tall else (basis, image)), alpha=1e-4)

    return case.layers * seconds.of(project), case.layers * seconds.of(fold)


def _inner_s(case: Case, seconds: _Seconds) -> float:
    coordinates = [rows * columns for rows, columns in case.shapes.coordinates[:7]]
    layer_s = seconds.of(_adamw_step(coordinates))
    embeddings_s = seconds.of(_adamw_step([case.vocabulary * case.hidden]))
    return case.layers * layer_s + 2 * embeddings_s


def _adamw_step(sizes: list[int]) -> Callable[[], object]:
    """Return a step of bitsandbytes' AdamW on tensors of these many elements, in slices."""
    from bitsandbytes.optim.adamw import AdamW8bit

    wholes = [torch.zeros(size, dtype=torch.bfloat16) for size in sizes]
    slices = [part for whole in wholes for part in torch.split(whole, SLICE_ELEMENTS)]
    parameters = [nn.Parameter(part) for part in slices]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    step: Callable[[], object] = AdamW8bit(parameters, lr=1e-4).step  # type: ignore[no-untyped-call]
    return step
