"""Any optimizer inside GaLore: it is the optimizer itself where nothing is lost by projecting, or it is refused."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Muon, Optimizer
from torchao.optim import AdamW4bit, AdamW8bit
from transformers import LlamaConfig, LlamaForCausalLM

import tests.device
from galore_torch import GaLore, param_groups
from tests.optim.small import assert_same, distance, gradient, refusing, tensors_in, walk, weights

pytestmark = pytest.mark.filterwarnings("ignore:rank .* saves no memory", "ignore:.*lr_scheduler:UserWarning")


class Lion(Optimizer):
    """The sign of a momentum, with decoupled decay: an optimizer that no library made."""

    def __init__(self, params, lr=1e-3, beta=0.9, weight_decay=0.0, maximize=False):
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay, "maximize": maximize})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                grad = -parameter.grad if group["maximize"] else parameter.grad
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(grad, 1 - group["beta"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * momentum.sign())


class BornWithState(Optimizer):
    """Makes its state in its constructor and nowhere else, as Adagrad does in torch 2.11."""

    def __init__(self, params, lr=1e-2, start=0.1, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for parameter in itertools.chain.from_iterable(group["params"] for group in self.param_groups):
            self.state[parameter] = {"step": 0, "sum": torch.full_like(parameter, start)}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] += 1
                grad = parameter.grad + group["weight_decay"] * parameter
                parameter.sub_(group["lr"] * grad / state["sum"].add_(grad.square()).sqrt())


class TrustRatio(Optimizer):
    """Steps in proportion to the norm of the parameter."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                ratio = parameter.norm() / parameter.grad.norm()
                parameter.sub_(group["lr"] * ratio * parameter.grad)


class ScheduleFree(Optimizer):
    """Steps at one point, and keeps the average of all points in the parameter."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                point = state.setdefault("point", parameter.clone())
                state["step"] = state.get("step", 0) + 1
                point.sub_(group["lr"] * parameter.grad)
                parameter.lerp_(point, 1 / state["step"])


class NormalizedByShape(Optimizer):
    """Steps of a size that follows from the number of the parameter's entries, not of the weight's."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.numel() ** 0.5 * parameter.grad / parameter.grad.norm())


@dataclass(frozen=True)
class Served:
    """An optimizer to try.

    Attributes:
        optimizer: its class.
        arguments: for its constructor.
        training: the rate at which it trains the small model.
        codes: whether it keeps its moments in few bits.
        decays_last: whether it decays after its update on a GPU. Inside, weights decay before it on all devices.
    """

    optimizer: type[Optimizer]
    arguments: dict[str, Any] = field(default_factory=dict)
    training: float = 0.02
    codes: bool = False
    decays_last: bool = False

    @property
    def others(self) -> type[Optimizer] | None:
        return AdamW if self.optimizer is Muon else None

    def takes(self, argument: str) -> bool:
        return argument in inspect.signature(self.optimizer).parameters

    def make(self, trained: list[Any], **arguments: Any) -> Optimizer:
        return self.optimizer(trained, **{**self.arguments, **arguments})

    def make_galore(self, groups: list[Any], **arguments: Any) -> GaLore:
        return GaLore(groups, self.optimizer, self.others, **{**self.arguments, **arguments})


SERVED = {
    "AdamW": Served(AdamW, {"fused": False}),
    "AdamW amsgrad": Served(AdamW, {"amsgrad": True, "foreach": True}),
    "AdamW fused": Served(AdamW, {"fused": True}),
    "SGD momentum": Served(SGD, {"momentum": 0.9, "nesterov": True}, training=0.2),
    "RMSprop": Served(torch.optim.RMSprop, {"momentum": 0.5, "centered": True}, training=0.003),
    "NAdam": Served(torch.optim.NAdam),
    "NAdam decoupled": Served(torch.optim.NAdam, {"decoupled_weight_decay": True}),
    "RAdam": Served(torch.optim.RAdam, training=0.2),
    "Adagrad": Served(torch.optim.Adagrad, training=0.1),
    "Adafactor": Served(torch.optim.Adafactor, training=0.3),
    "Lion": Served(Lion, training=0.01),
    "born with state": Served(BornWithState, training=0.1),
    "Muon": Served(Muon, {"momentum": 0.9}, training=0.05),
    "bitsandbytes AdamW8bit": Served(
        bitsandbytes.optim.AdamW8bit, {"min_8bit_size": 1024}, codes=True, decays_last=True
    ),
    "bitsandbytes Lion8bit": Served(bitsandbytes.optim.Lion8bit, {"min_8bit_size": 1024}, training=0.01, codes=True),
    "torchao AdamW8bit": Served(AdamW8bit, codes=True),
    "torchao AdamW4bit": Served(AdamW4bit, codes=True),
}
SHAPES = ((128, 64), (64, 64))  # at least 4096 entries, or nothing is kept in few bits
LR = 0.02
STEPS = 5


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao's kernels as plain Python: compiling them takes longer than all tests together, so one test does."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def equal_cases() -> list[Any]:
    cases = []
    for name, served in SERVED.items():
        directions = (False, True) if served.takes("maximize") else (False,)
        cases += [pytest.param(served, maximize, id=f"{name}{' maximize' * maximize}") for maximize in directions]
    return cases


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize(("served", "maximize"), equal_cases())
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.broad(
    "AdamW amsgrad maximize-0.3",
    "SGD momentum-0.0",
    "Lion-0.0",
    "Adafactor-0.0",
    "Muon-0.0",
    "torchao AdamW8bit-0.0",
    "bitsandbytes Lion8bit-0.0",
)
def test_with_the_identity_as_basis_it_is_the_optimizer_itself(served, maximize, weight_decay, identity_basis):
    arguments = {"lr": LR, "weight_decay": weight_decay} | ({"maximize": True} if maximize else {})
    start, ours, theirs = (weights(*SHAPES) for _ in range(3))
    galore = served.make_galore([{"params": ours, **identity_basis}], **arguments)
    if served.decays_last and tests.device.chosen != "cpu":
        plain = served.make(theirs, **{**arguments, "weight_decay": 0.0})
        plain.register_step_pre_hook(lambda *_: [weight.data.mul_(1 - LR * weight_decay) for weight in theirs] and None)
    else:
        plain = served.make(theirs, **arguments)
    walk(galore, ours, range(STEPS))
    walk(plain, theirs, range(STEPS))
    assert distance(theirs, start) > 5e-3  # it has gone somewhere
    assert distance(ours, theirs) <= 1e-6
    if served.codes:  # from the same gradients come the same codes: nothing is rounded differently
        for one, other in zip(ours, theirs, strict=True):
            assert_same(stored(galore.state[one]["inner"]), stored(plain.state[other]))


def stored(state: dict[str, Any]) -> list[Tensor]:
    """The codes and scales that moments are stored in; codes there must be."""
    found = []
    for tensor in tensors_in(state):
        parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        found += [getattr(tensor, part) for part in parts] or [tensor]
    assert any(tensor.dtype == torch.uint8 for tensor in found)
    return found


@pytest.mark.of_cpu("what puts tensors on another device is not compiled")
@pytest.mark.slow
def test_torchao_compiles_its_kernel_on_coordinates(identity_basis, monkeypatch):
    """Traced and guarded as ever; only the generated C++, which takes a minute to build, is left out."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    ours, theirs = weights(SHAPES[0]), weights(SHAPES[0])
    walk(GaLore([{"params": ours, **identity_basis}], AdamW8bit, lr=LR), ours, range(2))
    walk(AdamW8bit(theirs, lr=LR), theirs, range(2))
    assert distance(ours, theirs) <= 1e-6


@pytest.mark.usefixtures("uncompiled")
def test_a_rate_that_is_held_in_a_tensor_stays_a_number_here(identity_basis):
    """torchao wants tensors and refuses numbers; schedulers read and set numbers."""
    ours, theirs = weights(SHAPES[0]), weights(SHAPES[0])
    galore = GaLore([{"params": ours, **identity_basis}], AdamW8bit, lr=LR)
    plain = AdamW8bit(theirs, lr=LR)
    assert type(galore.param_groups[0]["lr"]) is float
    for step in range(3):
        galore.param_groups[0]["lr"] = LR * 0.5**step
        plain.param_groups[0]["lr"].fill_(LR * 0.5**step)
        walk(galore, ours, [step])
        walk(plain, theirs, [step])
    assert distance(ours, theirs) <= 1e-6


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("served", SERVED.values(), ids=SERVED)
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.broad
def test_what_is_not_projected_is_moved_by_the_optimizer_itself(served, weight_decay):
    """Or by `fallback_class`, where it cannot hold vectors."""
    arguments = {"lr": LR, "weight_decay": weight_decay}
    ours, theirs = weights(SHAPES[0], (64,), (64, 64)), weights(SHAPES[0], (64,), (64, 64))
    galore = served.make_galore([{"params": ours[:1], "rank": 4}, {"params": ours[1:]}], **arguments)
    plain = AdamW(theirs[1:], **arguments) if served.others else served.make(theirs[1:], **arguments)
    walk(galore, ours, range(STEPS))
    for step in range(STEPS):
        for index, weight in enumerate(theirs):
            weight.grad = gradient(weight, step, index)
        plain.step()
    assert distance(ours[1:], theirs[1:]) <= (1e-6 if served.optimizer is torch.optim.Adafactor else 0)


# Muon's rate depends on the shape: of W, not of the coordinates ------------------------------------------------------


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize(("shape", "proj_type"), [((96, 16), "std"), ((16, 96), "std"), ((96, 16), "full")])
def test_muon_on_coordinates_moves_as_far_as_muon_on_the_weight(shape, proj_type, adjust_lr_fn):
    """A gradient of rank 4 loses nothing in its subspace, and orthogonalizing commutes with an orthonormal basis."""
    (start,), (ours,), (theirs,) = weights(shape), weights(shape), weights(shape)
    arguments = {"lr": LR, "adjust_lr_fn": adjust_lr_fn, "weight_decay": 0.0}
    galore = GaLore([{"params": [ours], "rank": 4, "scale": 1.0, "proj_type": proj_type}], Muon, **arguments)
    plain = Muon([theirs], **arguments)
    low = gradient(torch.empty(shape[0], 4), 0, 0) @ gradient(torch.empty(4, shape[1]), 0, 1)
    for _ in range(3):
        ours.grad, theirs.grad = low.clone(), low.clone()
        galore.step()
        plain.step()
    moved, expected = (ours - start).detach(), (theirs - start).detach()
    # It orthogonalizes in bfloat16, whose noise Muon on the weight amplifies outside the subspace: look along ours.
    assert float((moved * expected).sum() / moved.square().sum()) == pytest.approx(1, abs=0.03)
    assert (moved * expected).sum() > 0.9 * moved.norm() * expected.norm()


# Refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "arguments", "reason"),
    [
        (torch.optim.ASGD, {}, "value of the parameter"),
        (bitsandbytes.optim.LAMB, {}, "value of the parameter"),
        (bitsandbytes.optim.LAMB8bit, {}, "value of the parameter"),
        (bitsandbytes.optim.LARS, {"lr": 1e-3, "momentum": 0.9}, "value of the parameter"),
        (TrustRatio, {}, "value of the parameter"),
        (ScheduleFree, {}, "value of the parameter"),
        (NormalizedByShape, {}, "shape of the parameter"),
        (torch.optim.LBFGS, {}, "closure"),
        (torch.optim.SparseAdam, {}, "dense gradients"),
    ],
    ids=lambda value: value.__name__ if inspect.isclass(value) else None,
)
def test_what_coordinates_cannot_serve_is_refused_by_name(optimizer, arguments, reason):
    message = refusing(lambda: GaLore([{"params": weights((8, 6)), "rank": 2}], optimizer, **arguments))
    assert message.startswith(f"{optimizer.__module__}.{optimizer.__name__} cannot run inside GaLore")
    assert reason in message


# A real model --------------------------------------------------------------------------------------------------------


def llama() -> LlamaForCausalLM:
    """A LLaMA whose embeddings and head are fixed, so that what is learnt is learnt in the projected weights."""
    torch.manual_seed(0)
    sizes = {
        "initializer_range": 0.1,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, max_position_embeddings=64, tie_word_embeddings=False, **sizes)
    )
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.requires_grad_(False)
    return model


def batches(count: int) -> Callable[[int], Tensor]:
    text = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()
    return lambda step: text[: count * 2 * 64].view(count, 2, 64)[step % count].to(tests.device.chosen)


@pytest.mark.learning
@pytest.mark.parametrize("served", SERVED.values(), ids=SERVED)
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.broad("AdamW", "Muon", "RMSprop", "bitsandbytes Lion8bit")
def test_it_lowers_the_loss_of_a_real_model(served):
    model, batch, losses = llama(), batches(10), []
    groups = param_groups(model, rank=16, update_proj_gap=10)
    assert len(groups[0]["params"]) == 7
    optimizer = served.make_galore(groups, lr=served.training)
    for step in range(25):
        loss = model(input_ids=batch(step), labels=batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < losses[0] - 1.0  # they fell by 1.5 to 2.7 over kernels, threads and seeds
