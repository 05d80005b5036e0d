"""What "fused" allocates and keeps: never an m x n gradient between renewals, and X Q in place of X."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from galore_torch import ProjectedGradient
from galore_torch.gradients import attach
from tests.gradients.allocations import Allocations
from tests.gradients.llama import GAP, adamw, attached, batch, llama, loss_of, projected_weights, walk
from tests.modes import MODES

FUSED = [mode for mode in MODES.values() if mode[0] == "fused"]
DIMENSION = 64
no_shared_heads = functools.partial(llama, num_key_value_heads=4)  # so that q, k and v are all square
copied_attention = functools.partial(no_shared_heads, attn_implementation="eager")  # keeps nothing of o_proj's input


def full_sizes(model: nn.Module, optimizer, step: int) -> tuple[int, int]:
    """How many layers are due in a step, and how many tensors of a projected weight's size its backward allocates."""
    due = sum(optimizer._trained_weight(weight).needs_renewal for weight in projected_weights(optimizer))
    loss = loss_of(model, batch(step, rows=1)[:, :3])  # three tokens: activations are smaller than any weight
    with Allocations() as seen:
        loss.backward()
    plain = {weight.numel() for weight in model.parameters()} - {w.numel() for w in projected_weights(optimizer)}
    smallest = min(weight.numel() for weight in projected_weights(optimizer))
    return due, sum(size >= smallest and size not in plain for size in (numel for numel, _ in seen.made))


@pytest.mark.parametrize("proj_type", ["std", "left", "right", "full"])
@pytest.mark.broad("right", "full")
def test_between_renewals_nothing_of_a_weights_size_is_allocated(proj_type):
    model = llama()
    optimizer = adamw(model, proj_type=proj_type)
    attach(model, optimizer, "fused")
    walk(model, optimizer, [0])
    for step in range(1, GAP + 2):
        due, allocated = full_sizes(model, optimizer, step)
        assert allocated == due  # a layer that renews forms its gradient, the others form none
        # So each step shows both. On a GPU those whose three tokens tell less than a basis stay due for a step more.
        assert 0 < due < len(projected_weights(optimizer))
        full_sizes(model, optimizer, step)  # a second micro-batch adds to what is there
        optimizer.step()
        optimizer.zero_grad()


def test_a_second_micro_batch_allocates_none_either():
    model, optimizer, _ = attached(("fused", "step"))
    walk(model, optimizer, [0])
    full_sizes(model, optimizer, 1)
    due, allocated = full_sizes(model, optimizer, 1)
    assert allocated == due
    grads = [weight.grad for weight in projected_weights(optimizer)]
    assert sum(isinstance(grad, ProjectedGradient) for grad in grads) == len(grads) - due


def test_the_trace_sees_full_gradients_where_they_are_formed():
    model, optimizer, _ = attached(("projected", "step"))
    walk(model, optimizer, [0])
    _, allocated = full_sizes(model, optimizer, 1)
    assert allocated >= len(projected_weights(optimizer))


# Saved for the backward -----------------------------------------------------------------------------------------------


@contextmanager
def noting_saved(model: nn.Module, layers: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """The tensors that layers save in their forwards, by their names' last part; parameters are left out."""
    saved: dict[str, list[Tensor]] = {}
    parameters = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    handles = []

    def enter(name: str, module: nn.Module, _) -> None:
        def note(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in parameters:
                saved.setdefault(name, []).append(tensor)
            return tensor

        module.noting = saved_tensors_hooks(note, lambda tensor: tensor)
        module.noting.__enter__()

    def leave(module: nn.Module, *_) -> None:
        module.noting.__exit__()
        del module.noting

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in layers:
            handles += [
                module.register_forward_pre_hook(functools.partial(enter, name)),
                module.register_forward_hook(leave),
            ]
    yield saved
    for handle in handles:
        handle.remove()


def saved_bytes(tensors: list[Tensor]) -> int:
    """What the tensors keep alive; those that share a storage count once."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def saved_by(model: nn.Module, layers: list[str], step: int) -> dict[str, list[Tensor]]:
    with noting_saved(model, layers) as saved:
        loss_of(model, batch(step))
    return saved


INPUT_SIDE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]


@pytest.mark.parametrize("mode", FUSED, ids=" ".join)
def test_input_side_layers_save_little_of_their_input(mode):
    everything = {}
    for one in (mode, None):
        model = copied_attention()
        optimizer = adamw(model, rank=DIMENSION // 4, update_proj_gap=1000)
        if one:
            attach(model, optimizer, *one)
        walk(model, optimizer, range(2))
        saved = saved_by(model, INPUT_SIDE, 2)
        everything[one] = saved_bytes([tensor for tensors in saved.values() for tensor in tensors])
    assert everything[mode] <= 0.6 * everything[None]


def test_what_an_attention_keeps_itself_is_not_projected_besides():
    kept = []
    for attaches in (False, True):
        model = no_shared_heads(num_hidden_layers=1)
        optimizer = adamw(model, rank=DIMENSION // 4, update_proj_gap=1000)
        if attaches:
            attach(model, optimizer, "fused")
        walk(model, optimizer, range(2))
        (tensors,) = saved_by(model, ["self_attn"], 2).values()
        kept.append(saved_bytes(tensors))
    one_number = batch(2).numel() * 4
    assert kept[0] - kept[1] == one_number * (DIMENSION - 3 * DIMENSION // 4)  # of q, k and v; nothing more of o


@pytest.mark.parametrize("make", [no_shared_heads, llama], ids=["all input-side", "k and v output-side"])
@pytest.mark.parametrize("rank", [16, 24, 40])
@pytest.mark.parametrize("siblings", [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]], ids=" ".join)
@pytest.mark.broad
def test_layers_that_share_an_input_never_save_more_than_it(make, rank, siblings):
    """Also while one of them renews, and so needs all of the input."""
    model = make()
    optimizer = adamw(model, rank=rank)
    attach(model, optimizer, "fused")
    one_input = batch(0).numel() * DIMENSION * 4
    fewer = 0
    for step in range(GAP + 3):
        by_layer: dict[str, list[Tensor]] = {}
        for name, tensors in saved_by(model, siblings, step).items():
            by_layer.setdefault(name.rpartition(".")[0], []).extend(tensors)
        for tensors in by_layer.values():
            assert saved_bytes(tensors) <= one_input
            fewer += saved_bytes(tensors) < one_input
        walk(model, optimizer, [step])
    right = all(optimizer._trained_weight(w).projection.modes[0].name == "right" for w in siblings_of(model, siblings))
    assert (fewer > 0) == (right and rank * len(siblings) < DIMENSION)


def siblings_of(model: nn.Module, siblings: list[str]) -> list[Tensor]:
    return [module.weight for name, module in model.named_modules() if name.rpartition(".")[2] in siblings]
