"""A training of a few steps that takes no memory: the real model, optimizer and hooks on tensors without numbers."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from galore_torch.gradients import attach
from galore_torch.memory.copies import alike_blocks, copy_without_numbers
from galore_torch.memory.recorder import FIRST_BLOCK, FIRST_STEP, Recorder
from galore_torch.modes import DEFAULT_SAVE_INPUTS
from galore_torch.optim import GaLore
from galore_torch.optim.groups import is_projected
from galore_torch.optim.outcomes import Outcomes
from galore_torch.optim.state_keys import BASIS, RENEWED_STEP

FEW = 2
"""Blocks of the copy that is rehearsed in place of a model of many that are all alike."""


_Owned = Iterable[tuple[Tensor, Any]]
"""Tensors, each with the weight or buffer that it is or belongs to."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, and how.

    Attributes:
        model: on any device; it is not changed.
        optimizer: makes the optimizer of the model that it is given, a copy.
        batch: what the model is called with, by name: a tensor, or the shape of a tensor of whole numbers.
        prepare: what is done with the copy before, such as putting adapters into it.
        gradients: how gradients are formed, of a GaLore optimizer; see `galore_torch.attach`.
        update: when they are applied, of the same.
        grad_bits: of projected gradients that wait, of the same.
        save_inputs: what fused layers save of their inputs, of the same.
        micro_batches: how many are accumulated for a step.
        device: where it would be trained.
    """

    model: nn.Module
    optimizer: Callable[[nn.Module], Optimizer]
    batch: Mapping[str, Tensor | tuple[int, ...]]
    prepare: Callable[[nn.Module], Any] = lambda _: None
    gradients: Any = "full"
    update: Any = "step"
    grad_bits: int = 16
    save_inputs: Any = DEFAULT_SAVE_INPUTS
    micro_batches: int = 1
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What the rehearsal of a job came to, in bytes.

    Attributes:
        held: weights, gradients before a step, states and bases.
        peaks: by phase, those of each kind at the phase's highest moment.
        parameters: numbers of them, and ``trained``: of those that are trained.
        untraced: why the forward could not go on, such as an operation's name, and so there are no activations.
    """

    held: Counter[str]
    peaks: dict[str, Counter[str]]
    parameters: int
    trained: int
    untraced: str | None


def rehearse(job: Job, *, exact: bool = False) -> Rehearsal:
    """Make two steps of a training: one of gradients alone, and one with a renewal.

    The latter has one micro-batch, which meets the gradients of others where there are more. Of a model of many blocks
    that are all alike two are rehearsed, and each of the others takes as much as they do.

    Args:
        job: what is trained.
        exact: whether all of such a model is rehearsed.

    Returns:
        The bytes.
    """
    further = 0 if exact else max(0, len(alike_blocks(job.model)) - FEW)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.cache_enabled = False  # `known` keeps as much, and a second store costs more than it spares
    model = copy_without_numbers(prepared(job, FEW if further else None), torch.device(job.device), mode=mode)
    recorder = Recorder(_vocabulary(model), _tokens(job.batch))
    with warnings.catch_warnings():  # what is to be said will be said of the real run
        warnings.simplefilter("ignore")
        optimizer = job.optimizer(model)  # outside: it is tried on numbers
    _take_numbers(optimizer, mode)
    # What an optimizer compiles (torchao's do) takes no tensors without numbers; in eager mode it keeps as much. The
    # compiler takes seconds to import; where nobody has done so yet, there is nothing that it has compiled.
    compiles = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext()
    with warnings.catch_warnings(), eager, mode, recorder:
        warnings.simplefilter("ignore")
        training = _Training(job, model, optimizer, recorder)
        found = training.run(further)
    return rehearse(job, exact=True) if further and not training.blocks_are_alike else found


def prepared(job: Job, blocks: int | None = None) -> nn.Module:
    """A copy of a job's model on the meta device, as it is trained.

    Args:
        job: what is trained.
        blocks: how many of the model's `alike_blocks` it has; all if None.
    """
    meta = torch.device("meta")
    model = copy_without_numbers(job.model, meta, blocks).train()
    with warnings.catch_warnings(), meta, Recorder():
        warnings.simplefilter("ignore")
        job.prepare(model)
    return model


class _Training:
    def __init__(self, job: Job, model: nn.Module, optimizer: Optimizer, recorder: Recorder) -> None:
        self.job, self.model, self.optimizer, self.recorder = job, model, optimizer, recorder
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]
        blocks = alike_blocks(model)
        self.block_of = _owners(blocks)
        self.blocks_are_alike = len(blocks) > 1
        self._hold("weights", self._weights())
        for weight in self.trained:  # before the hooks that free gradients
            weight.register_post_accumulate_grad_hook(self._note_gradient)  # type: ignore[no-untyped-call]
        if isinstance(optimizer, GaLore):
            optimizer._outcomes = _AsHoped()
            modes = job.gradients, job.update
            attach(model, optimizer, *modes, grad_bits=job.grad_bits, save_inputs=job.save_inputs)
        self.batch = {name: _as_tensor(one, job.device) for name, one in job.batch.items()}
        for place, block in enumerate(blocks):
            block.register_forward_pre_hook(self._beginning(place))
            block.register_forward_hook(self._ending(place, len(blocks)))
        self.untraced: str | None = None

    def run(self, further: int) -> Rehearsal:
        """Make a first step, of gradients alone, and an ordinary one, of a model of so many blocks more."""
        if self.job.gradients == "fused":
            self._forward()  # layers learn who shares an input
        self.recorder.phase(FIRST_STEP)
        self._backward(None)
        held = {"gradients": self._bytes("gradients", self._gradients(), further)}
        self._step()
        self._let_one_renew()
        if self.job.micro_batches > 1:  # the last of them meets what those before it have left
            self._backward(None)
        self.recorder.phase("forward")
        loss = self._forward()
        self.recorder.phase("backward" if loss is None else "head")
        self._backward(loss)
        del loss
        self.recorder.phase("step")
        self._step()
        held["weights"] = self._bytes("weights", self._weights(), further)
        held["bases"] = self._bytes("bases", self._state(bases=True), further)
        held["states"] = self._bytes("states", self._state(bases=False), further)
        numbers = [(one.numel(), one.requires_grad, self.block_of.get(id(one)) == 0) for one in self.model.parameters()]
        return Rehearsal(
            held=Counter(held),
            peaks=self.recorder.peaks(further),
            parameters=sum(size * (1 + further * repeats) for size, _, repeats in numbers),
            trained=sum(size * (1 + further * repeats) for size, is_trained, repeats in numbers if is_trained),
            untraced=self.untraced,
        )

    def _bytes(self, kind: str, owned: _Owned, further: int) -> int:
        """The bytes of tensors of a kind, with those of so many blocks more."""
        pairs = list(owned)
        self._hold(kind, pairs)
        found = self.recorder.bytes_of(tensor for _, tensor in pairs)
        self.blocks_are_alike &= found[0] == found[1]
        return found[None] + further * found[0]

    def _forward(self) -> Tensor | None:
        """The loss; None if an operation stops on the way."""
        if self.untraced is not None:
            return None
        self.recorder.begin_forward()
        level = fake_tensor.log.level
        fake_tensor.log.setLevel(logging.CRITICAL)  # it shows the traceback of what we report in a word
        try:
            with _not_traced():
                loss: Tensor = self.model(**self.batch).loss
        except (RuntimeError, AttributeError) as error:
            # Memory that depends on numbers, an operation without sizes, a layer that lacks what the model reads of it.
            self.untraced = str(getattr(error, "func", error)).strip().splitlines()[0]
            return None
        finally:
            fake_tensor.log.setLevel(level)
            self.recorder.end_forward()
        return loss

    def _backward(self, loss: Tensor | None) -> None:
        """Form the gradients: zeros where there is no loss."""
        if loss is not None:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        # Of one number each, so that no more than one whole gradient is there before hooks have seen it.
        zeros = [torch.zeros((), dtype=one.dtype, device=one.device).expand(one.shape) for one in self.trained]
        torch.autograd.backward(self.trained, zeros)

    def _step(self) -> None:
        self._hold("gradients", self._gradients())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._hold("bases", self._state(bases=True))
        self._hold("states", self._state(bases=False))

    def _beginning(self, place: int) -> Callable[..., None]:
        """A hook on a block's input."""

        def begin(_: nn.Module, given: Any) -> None:
            self.recorder.block = place
            if not place:
                self._mark("embeddings", given)

        return begin

    def _ending(self, place: int, count: int) -> Callable[..., None]:
        """A hook on a block's output, by which its backward is a phase, and what follows the last block's forward."""
        is_last = place == count - 1

        def end(_: nn.Module, __: Any, output: Any) -> None:
            self.recorder.block = None
            if is_last:
                self.recorder.phase("head")
            self._mark("last block" if is_last else "other blocks" if place else FIRST_BLOCK, output)

        return end

    def _mark(self, name: str, tensors: Any) -> None:
        """Let a phase begin when the gradient of the first of tensors is there."""
        for tensor in tree_leaves(tensors)[:1]:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self.recorder.phase(name))  # type: ignore[no-untyped-call]

    def _note_gradient(self, weight: Tensor) -> None:
        self._hold("gradients", [(weight, weight.grad)])

    def _hold(self, kind: str, owned: _Owned) -> None:
        for owner, tensor in owned:
            self.recorder.hold(kind, [tensor], self.block_of.get(id(owner)))

    def _weights(self) -> _Owned:
        return ((one, one) for one in (*self.model.parameters(), *self.model.buffers()))

    def _gradients(self) -> _Owned:
        return ((weight, weight.grad) for weight in self.trained)

    def _state(self, *, bases: bool) -> _Owned:
        for weight, state in self.optimizer.state.items():
            for key, value in state.items():
                if (key == BASIS) == bases:
                    yield from ((weight, leaf) for leaf in tree_leaves(value))

    def _let_one_renew(self) -> None:
        """As many as renew in one step: the largest of them, or all where they do not take turns."""
        for group in self.optimizer.param_groups if isinstance(self.optimizer, GaLore) else ():
            held = [weight for weight in group["params"] if BASIS in self.optimizer.state.get(weight, {})]
            if is_projected(group) and held:
                at_once = -(-len(held) // group["update_proj_gap"]) if group["stagger"] else len(held)
                for weight in sorted(held, key=Tensor.numel)[-at_once:]:
                    self.optimizer.state[weight][RENEWED_STEP] = -1


def _owners(blocks: Sequence[nn.Module]) -> dict[int, int]:
    """Which of some blocks has a weight or a buffer, by its identity; those that several share are of none."""
    pairs = [(id(one), place) for place, block in enumerate(blocks) for one in (*block.parameters(), *block.buffers())]
    times = Counter(number for number, _ in pairs)
    return {number: place for number, place in pairs if times[number] == 1}


class _AsHoped(Outcomes):
    """Of gradients without numbers each tells a whole basis: no device is asked whether it did."""

    def expect(self, *_: Any) -> None:
        """Wait for nothing."""


@contextmanager
def _not_traced() -> Iterator[None]:
    """Let Transformers ask for numbers, and be told the usual ones.

    It takes tensors without numbers for a compiler's, which must not be asked whether anything is masked, and makes
    masks for them that a real forward does without: a number for every pair of tokens, in each layer.
    """
    masking = sys.modules.get("transformers.masking_utils")
    asked = getattr(masking, "is_tracing", None)
    if asked is None:
        yield
        return
    masking.is_tracing = lambda *_: False  # type: ignore[union-attr]
    try:
        yield
    finally:
        masking.is_tracing = asked  # type: ignore[union-attr]


def _take_numbers(optimizer: Optimizer, mode: FakeTensorMode) -> None:
    """Take their numbers from tables that an optimizer has made already, as bitsandbytes' does; states share them."""
    rules = [optimizer._rules.rule, optimizer._rules.fallback] if isinstance(optimizer, GaLore) else []
    for one in [rule._optimizer for rule in rules] or [optimizer]:
        for table in [value for value in vars(one).values() if isinstance(value, dict)]:
            for name, value in table.items():
                if type(value) is Tensor:
                    table[name] = mode.from_tensor(value)


def _as_tensor(given: Tensor | tuple[int, ...], device: str) -> Tensor:
    if isinstance(given, Tensor):
        return torch.zeros(given.shape, dtype=given.dtype, device=device)
    return torch.zeros(given, dtype=torch.int64, device=device)


def _tokens(batch: Mapping[str, Tensor | tuple[int, ...]]) -> int:
    first = next(iter(batch.values()))
    return torch.Size(first.shape if isinstance(first, Tensor) else first).numel()


def _vocabulary(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):  # models of images and text have it in there
        config = config.get_text_config()
    return int(getattr(config, "vocab_size", None) or 0)
