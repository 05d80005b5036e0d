"""Every optimizer of the libraries that people bring, tried inside GaLore, and what became of each.

`python -m tests.optim.served_optimizers` writes docs/optimizers.md; `test_optimizers_table.py` holds the file to it.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import logging
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.optim import Optimizer

from galore_torch import GaLore
from galore_torch.optim.probe import traits_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "optimizers.md"
LIBRARIES = {
    "torch.optim": "torch",
    "bitsandbytes.optim": "bitsandbytes",
    "torchao.optim": "torchao",
    "pytorch_optimizer": "pytorch_optimizer",
    "optimi": "torch-optimi",
    "prodigyopt": "prodigyopt",
    "schedulefree": "schedulefree",
}
STEPS = 30

ARGUMENTS: dict[str, dict[str, Any]] = {
    **{f"bitsandbytes.optim.{name}": {"lr": 1e-3, "momentum": 0.9} for name in ("SGD", "SGD8bit", "SGD32bit")},
    **{f"bitsandbytes.optim.{name}": {"lr": 1e-3, "momentum": 0.9} for name in ("LARS", "LARS8bit", "LARS32bit")},
    "bitsandbytes.optim.PytorchLARS": {"lr": 1e-3, "momentum": 0.9},
    "pytorch_optimizer.BSAM": {"num_data": 100},
    "pytorch_optimizer.Ranger21": {"num_iterations": 100},
    **{f"pytorch_optimizer.{name}": {"base_optimizer": torch.optim.SGD} for name in ("SAM", "LookSAM", "FriendlySAM")},
    "pytorch_optimizer.GSAM": {"base_optimizer": torch.optim.SGD, "model": None, "rho_scheduler": None},
}
"""Arguments of those that cannot do without; every other has its defaults, and decays nothing where it would."""

REASONS = (
    ("value of the parameter", "its update depends on the value of the parameter"),
    ("shape of the parameter", "the size of its update depends on the shape of the parameter"),
    ("loss that a closure returns", "it reads the loss"),
    ("closure", "it needs a closure"),
    ("a checkpoint cannot", "its state holds what a checkpoint cannot"),
    ("in another place", "it keeps something outside its state and its group"),
    ("did not move", "it did not move in 30 steps"),
    ("has the name of a key", "it projects by itself: its settings have the names of GaLore's"),
    ("CPU Offload", "it wraps another optimizer"),
    ("cannot be made for a list", "it is not made for a list of parameters"),
    ("holds another optimizer", "it wraps another optimizer"),
    ("does not take its arguments", "it wraps another optimizer"),
    ("required positional argument", "it wraps another optimizer or a model"),
    ("does not require grad", "it differentiates twice, and needs the graph"),
    ("dense gradients", "it takes sparse gradients only"),
    ("raised", "on a small matrix it raises an error of its own"),
)


@dataclass(frozen=True)
class Found:
    """What became of one optimizer.

    Attributes:
        name: as it is imported.
        refusal: why it is not supported, in full; None if it is.
        decay: where its decay acts.
        is_equal: whether 30 steps of parameters that are not projected were those of the optimizer alone, to the bit.
        notes: what else is to be known.
    """

    name: str
    refusal: str | None = None
    decay: str = "none"
    is_equal: bool = True
    notes: list[str] = field(default_factory=list)

    @property
    def row(self) -> str:
        if self.refusal is not None:
            reason = next((short for part, short in REASONS if part in self.refusal), f"`{self.refusal}`")
            return f"| `{self.name}` | not supported: {reason} |"
        served = {
            "none": "runs exactly",
            "l2": "runs exactly; decay is L2, from W",
            "decoupled": "runs exactly; decay is decoupled, from W",
            "unsupported": "runs exactly without decay, which is neither L2 nor decoupled",
        }[self.decay]
        return f"| `{self.name}` | {'; '.join([served, *self.notes])} |"


def optimizers_of(library: str) -> list[tuple[str, type[Optimizer]]]:
    """The public optimizer classes of a library, by the name under which they are imported."""
    found = {
        name: value
        for name, value in vars(importlib.import_module(library)).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer and name[0] != "_"
    }
    return sorted((f"{library}.{name}", value) for name, value in found.items())


def arguments_of(name: str, optimizer: type[Optimizer]) -> dict[str, Any]:
    """What it is made with: what it cannot do without, and no decay."""
    parameters = inspect.signature(optimizer).parameters
    arguments = dict(ARGUMENTS.get(name, {}))
    if "lr" in parameters and parameters["lr"].default is inspect.Parameter.empty:
        arguments.setdefault("lr", 1e-3)
    if "weight_decay" in parameters:
        arguments["weight_decay"] = 0.0
    if "triton" in parameters:  # which torch for CUDA brings; it is taken where there is no GPU, too
        arguments["triton"] = False
    return arguments


def try_inside(name: str, optimizer: type[Optimizer]) -> Found:
    """Makes one, and moves parameters by it inside and alone, in two groups one of which rests at times."""
    arguments = arguments_of(name, optimizer)
    numpy.random.seed(0)  # some draw from it
    with _quiet():
        try:
            _walk(lambda groups: GaLore([{"params": [_weight(8, 6)], "rank": 2}], optimizer, **arguments), moves=False)
        except (TypeError, ValueError) as error:
            if optimizer.__name__ not in str(error):
                raise
            return Found(name, refusal=str(error))
        rests = True
        try:
            alone = _walk(lambda groups: optimizer(groups, **arguments))
        except Exception:  # it does not bear a group without gradients
            rests = False
            alone = _walk(lambda groups: optimizer(groups, **arguments), rests=False)
        inside = _walk(lambda groups: GaLore(groups, optimizer, **arguments), rests=rests)
        notes = [] if traits_of(optimizer, arguments).many_calls else ["all weights in one call"]
        is_equal = all(torch.equal(one, other) for one, other in zip(inside, alone, strict=True))
        return Found(name, decay=traits_of(optimizer, arguments).decay, is_equal=is_equal, notes=notes)


def _weight(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


def _walk(make: Callable[[list[dict[str, Any]]], Optimizer], moves: bool = True, rests: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    random.seed(0)
    trained = [_weight(64, 64), _weight(16, 24), _weight(8, 6)]
    optimizer = make([{"params": trained[:2]}, {"params": trained[2:]}])
    for step in range(STEPS if moves else 0):
        for index, weight in enumerate(trained):
            generator = torch.Generator().manual_seed(1000 * step + index)
            weight.grad = torch.randn(weight.shape, generator=generator)
        if rests and step in (0, 7):  # the last group rests, and so does one weight of the other
            trained[2].grad = None
        if rests and step == 9:
            trained[1].grad = None
        optimizer.step()
    return [weight.detach() for weight in trained]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    compile_as_is = torch.compile
    torch.compile = lambda function=None, **_: function  # type: ignore[assignment]
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.compile = compile_as_is
        logging.disable(logging.NOTSET)


def section(library: str) -> str:
    """The table of one library."""
    found = [try_inside(name, optimizer) for name, optimizer in optimizers_of(library)]
    assert [one.name for one in found if not one.is_equal] == []
    rows = "\n".join(one.row for one in found)
    served = sum(one.refusal is None for one in found)
    head = f"## {LIBRARIES[library]}\n\n{served} of {len(found)} are supported."
    return f"{head}\n\n| optimizer | inside GaLore |\n| --- | --- |\n{rows}\n"


HEAD = """# Which optimizers run inside

`GaLore(groups, optimizer_class=Class, **arguments)` runs any optimizer whose update follows from gradient and state. It
is tried when it is made, on a small matrix over 30 steps, beside the optimizer itself; one that does not fit raises a
`ValueError` with its name and the reason. This page is made by that trial: each optimizer moved three parameters that
are not projected for 30 steps, inside and alone, some of them without a gradient now and then. All that are supported
ended at the same numbers, to the bit.

- **Runs exactly**: what it keeps in its state and what it writes into its parameter group is kept, and saved.
- **Decay from W**: for projected weights GaLore applies `weight_decay` to the weight itself, as the optimizer would.
  Where decay is neither L2 nor decoupled, a projected group with `weight_decay` raises an error.
- **All weights in one call**: it looks at all weights together; `update="backward"` raises an error.
- Weights of 16 bits: `kahan_sum=True` (torch-optimi, where it is the default, and pytorch_optimizer) and
  `bf16_stochastic_round=True` (torchao) hold for projected weights, too; `rounding="stochastic"` or `"compensated"`
  does the same for every optimizer. Compensation takes two bytes a number of the weight.
- bitsandbytes' `GlobalOptimManager` settings of single weights hold for their coordinates.
- Parameters that are not projected may have another class: `fallback_class=Class`.

Made by `python -m tests.optim.served_optimizers`, with the libraries' versions of constraints.txt.

"""


def page() -> str:
    """The whole of docs/optimizers.md."""
    return HEAD + "\n".join(section(library) for library in LIBRARIES)


if __name__ == "__main__":
    PAGE.write_text(page())
