"""What fused layers save of their inputs: X Q, every fourth token, or all; and that gradients are right for it."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

from galore_torch import GaLore, GaLoreAdamW, ProjectedGradient, param_groups, quantize_weights
from galore_torch.gradients import attach
from galore_torch.gradients.projected_linear import SAMPLED
from tests.gradients.llama import GAP, adamw, batch, distance, llama, walk, weights
from tests.gradients.test_fused_memory import saved_by, saved_bytes
from tests.optim.small import assert_same

TOKENS = 26  # no multiple of four
PROJ_TYPES = ["std", "left", "right", "full"]


def net(in_int8: bool) -> nn.Module:
    """A layer whose basis is on the input side by default, and one that has it on the output side."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    if not in_int8:
        return model.double()
    quantize_weights(model, "all-linear", group_size=8)
    return model


@functools.cache
def gradients(
    form: str, save_inputs: str, proj_type: str = "std", seed: int = 0, in_int8: bool = False
) -> list[Tensor]:
    """Projected gradients of both layers in the step after the first, whose bases and update are the same for all."""
    model = net(in_int8)
    keys = {"proj_type": proj_type, "decomposition": "svd", "stagger": False, "update_proj_gap": 9}
    optimizer = GaLoreAdamW(param_groups(model, 4, "all-linear", **keys), lr=1e-2, seed=seed)
    attach(model, optimizer, form, save_inputs=save_inputs)
    for step in range(2):
        optimizer.zero_grad()
        x = torch.randn(TOKENS, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model(x.to(model[0].bias.dtype)).sin().square().sum().backward()
        if step == 0:
            optimizer.step()
    found = []
    for layer in (model[0], model[2]):
        grad, trained = layer.weight.grad, optimizer._trained_weight(layer.weight)
        if not isinstance(grad, ProjectedGradient):
            grad = ProjectedGradient.of(grad, trained.projection, trained.basis)
        found.append(grad.projected.clone())
    return found


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("save_inputs", ["projected", "full"])
def test_what_a_basis_needs_of_an_input_gives_the_gradient_of_all_of_it(proj_type, save_inputs):
    ours, exact = gradients("fused", save_inputs, proj_type), gradients("full", "projected", proj_type)
    for one, other in zip(ours, exact, strict=True):
        assert (one - other).norm() <= 1e-12 * other.norm()


@pytest.mark.parametrize("in_int8", [False, True])
@pytest.mark.parametrize("proj_type", ["std", "left"])
@pytest.mark.broad
def test_sampled_gradients_are_right_on_average(proj_type, in_int8):
    """Each token is in one of the four samples: the mean over the four is the gradient, and each is as frequent."""
    exact = gradients("fused", "full", proj_type, in_int8=in_int8)
    seeds = range(48)
    by_seed = [gradients("fused", "sampled", proj_type, seed, in_int8) for seed in seeds]
    for place, sampled in enumerate([False, True] if proj_type == "std" else [True, True]):
        drawn = torch.stack([grads[place] for grads in by_seed])
        different, counts = drawn.unique(dim=0, return_counts=True)
        assert len(different) == (SAMPLED if sampled else 1)
        tolerance = 1e-5 if in_int8 else 1e-12
        assert (different.mean(0) - exact[place]).norm() <= tolerance * exact[place].norm()
        standard_error = drawn.std(0).norm() / len(seeds) ** 0.5
        assert (drawn.mean(0) - exact[place]).norm() <= 2 * standard_error + tolerance * exact[place].norm()
        assert counts.min() > 0.4 * counts.float().mean()


# In training ----------------------------------------------------------------------------------------------------------


def trained(update: str = "step", checkpointing: bool | None = None, steps: int = GAP + 2) -> list[Tensor]:
    """Weights after some steps with sampled inputs, of activations that are recomputed in either way, or kept."""
    model, optimizer = sampled(update)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    model.train()
    walk(model, optimizer, range(steps), micro_batches=1 if update == "backward" else 2)
    return weights(model)


def sampled(update: str = "step") -> tuple[nn.Module, GaLore]:
    model = llama(num_hidden_layers=1)
    optimizer = adamw(model)
    attach(model, optimizer, "fused", update, save_inputs="sampled")
    return model, optimizer


def test_sampling_changes_what_is_learnt():
    """So that the tests below say something."""
    model = llama(num_hidden_layers=1)
    optimizer = adamw(model)
    attach(model, optimizer, "fused")
    walk(model, optimizer, range(3))
    other, others = sampled()
    walk(other, others, range(3))
    assert distance(model, other) > 1e-4


def test_updates_in_the_backward_are_those_of_a_step():
    ends = []
    for update in ("step", "backward"):
        model, optimizer = sampled(update)
        walk(model, optimizer, range(GAP + 2))
        ends.append(model)
    assert distance(*ends) <= 1e-6


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_draws_the_same_tokens(update, reentrant):
    assert_same(trained(update, reentrant), trained(update))


def test_a_run_goes_on_bit_for_bit():
    whole, optimizer = sampled()
    walk(whole, optimizer, range(GAP))
    kept = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    walk(whole, optimizer, range(GAP, 2 * GAP))
    resumed, resumed_optimizer = sampled()
    resumed.load_state_dict(kept[0])
    resumed_optimizer.load_state_dict(kept[1])
    walk(resumed, resumed_optimizer, range(GAP, 2 * GAP))
    assert_same(weights(resumed), weights(whole))


# Bytes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("save_inputs", "proj_type", "numbers"),
    [
        ("full", "std", 160),
        ("projected", "std", 160),
        ("sampled", "std", 160 / SAMPLED),
        ("projected", "right", 8),
        ("sampled", "right", 8),
        ("projected", "full", 8),
    ],
)
def test_what_a_layer_down_keeps_of_each_token(save_inputs, proj_type, numbers):
    model = llama(num_hidden_layers=1)
    optimizer = adamw(model, proj_type=proj_type, update_proj_gap=1000)
    attach(model, optimizer, "fused", save_inputs=save_inputs)
    walk(model, optimizer, range(2))
    (tensors,) = saved_by(model, ["down_proj"], 2).values()
    assert saved_bytes(tensors) == batch(2).numel() * numbers * 4


@pytest.mark.parametrize(("save_inputs", "share"), [("full", 1.0), ("projected", 1.0), ("sampled", 0.625)])
def test_layers_of_both_sides_that_share_an_input_keep_little_of_it_together(save_inputs, share):
    """q has its basis on the input side, k and v have theirs on the output side."""
    model = llama(num_hidden_layers=1)
    optimizer = adamw(model, update_proj_gap=1000)
    attach(model, optimizer, "fused", save_inputs=save_inputs)
    walk(model, optimizer, range(2))
    saved = saved_by(model, ["q_proj", "k_proj", "v_proj"], 2)
    kept = saved_bytes([tensor for tensors in saved.values() for tensor in tensors])
    assert kept == batch(2).numel() * 64 * 4 * share


# Compiled -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.of_cpu("what puts tensors on another device is not compiled")
def test_a_compiled_model_leaves_sampled_layers_out_of_its_graph():
    torch._dynamo.reset()
    compiled, optimizer = sampled()
    walk(torch.compile(compiled, backend="eager"), optimizer, range(GAP + 2))
    eager, others = sampled()
    walk(eager, others, range(GAP + 2))
    assert distance(compiled, eager) <= 1e-6
    whole, _ = sampled()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(whole, backend="eager", fullgraph=True)(batch(0))
