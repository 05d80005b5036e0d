"""Which gradients are alive: in the backward, after it, and after `step()`."""

from __future__ import annotations

import gc
import weakref

import pytest
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from galore_torch import GaLore
from galore_torch.gradients.applied_gradient import AppliedGradient
from tests.gradients.allocations import Allocations
from tests.gradients.llama import GAP, attached, batch, loss_of, projected_weights
from tests.modes import MODES, every_mode

STORING = [mode for mode in MODES.values() if mode[0] != "full" and mode[1] == "step"]
IN_BACKWARD = [mode for mode in MODES.values() if mode[1] == "backward"]


class FullGradients(Allocations):
    """Counts the living tensors of the size of some projected weight, which no activation has; states may have it."""

    def __init__(self, optimizer: GaLore) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.sizes = {weight.numel() for weight in projected_weights(optimizer)}

    def count(self) -> int:
        states = [one for one in tree_leaves(list(self.optimizer.state.values())) if isinstance(one, Tensor)]
        held = {StorageWeakRef(one.untyped_storage()) for one in states}
        return sum(size in self.sizes and ref not in held for size, ref in self.made if not ref.expired())


def backward(model: nn.Module, step: int) -> None:
    loss_of(model, batch(step)[:1, :5]).backward()  # five tokens


@pytest.mark.parametrize("mode", STORING, ids=" ".join)
@pytest.mark.broad("fused step")
def test_after_a_backward_full_gradients_are_those_of_layers_that_renew(mode):
    model, optimizer, _ = attached(mode)
    with FullGradients(optimizer) as full:
        backward(model, 0)
        assert full.count() == 0  # the first bases are found from the first micro-batch
        optimizer.step()
        optimizer.zero_grad()
        for step in range(1, GAP):
            all_trained = [optimizer._trained_weight(weight) for weight in projected_weights(optimizer)]
            assert step > 1 or any(
                trained.completes_basis for trained in all_trained
            )  # five tokens tell less than the rank
            due = sum(trained.needs_renewal and not trained.completes_basis for trained in all_trained)
            for _ in range(2):
                backward(model, step)
                assert full.count() == due > 0
            optimizer.step()
            optimizer.zero_grad()
            assert full.count() == 0


def test_the_count_sees_full_gradients_where_they_are_kept():
    model, optimizer, _ = attached(("full", "step"))
    with FullGradients(optimizer) as full:
        backward(model, 0)
        assert full.count() == len(projected_weights(optimizer))


@pytest.mark.parametrize("mode", IN_BACKWARD, ids=" ".join)
@pytest.mark.broad("fused backward")
def test_applied_inside_the_backward_no_gradient_is_alive_after_it(mode):
    model, optimizer, _ = attached(mode)
    everything = {weight.numel() for weight in model.parameters()}
    for step in range(3):
        with FullGradients(optimizer) as full:
            backward(model, step)
        assert full.count() == 0
        state = [one for one in full.alive() if one in everything]
        assert len(state) == (0 if step else 2 * len(unprojected(model, optimizer)))  # Adam's moments are made
        assert all(isinstance(weight.grad, AppliedGradient) for weight in model.parameters())
        optimizer.step()
        assert all(weight.grad is None for weight in model.parameters())


def unprojected(model: nn.Module, optimizer: GaLore) -> list[Tensor]:
    projected = {id(weight) for weight in projected_weights(optimizer)}
    return [weight for weight in model.parameters() if id(weight) not in projected]


@pytest.mark.parametrize("mode", [*STORING, *IN_BACKWARD], ids=" ".join)
def test_inside_the_backward_one_full_gradient_at_a_time(mode):
    """In the first step, where every layer needs its full gradient to find a basis."""
    model, optimizer, _ = attached(mode)
    alive: list[int] = []
    with FullGradients(optimizer) as full:
        for weight in projected_weights(optimizer):
            weight.register_hook(lambda grad: alive.append(full.count()))
        backward(model, 0)
    assert len(alive) == len(projected_weights(optimizer))
    assert set(alive) <= {1, 2}  # of one layer, while its neighbour's has just been formed


@every_mode
def test_a_model_that_is_dropped_is_freed(mode):
    """With its optimizer, and without a call of remove()."""
    model, optimizer, attachment = attached(mode)
    backward(model, 0)
    dropped = [weakref.ref(one) for one in (model, optimizer, *model.parameters())]
    del model, optimizer, attachment
    gc.collect()
    assert [one() for one in dropped] == [None] * len(dropped)
