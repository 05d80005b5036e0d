"""Residuals, moments and normalized updates in all layouts, dtypes and modes, and what is refused."""

import io

import pytest
import torch
from torch import nn

from galore_torch import GaLore, GaLoreAdafactor, GaLoreAdamW, attach, quantize_weights
from galore_torch.group_keys import KEYS
from galore_torch.optim.groups import projection_in
from galore_torch.optim.state_keys import BASIS, RESIDUAL_ENERGY, RESIDUAL_NORM
from tests.optim.small import assert_same, gradient, snapshot, walk, weights

RESIDUALS, SIZES = KEYS["residual"].choices, (None, *KEYS["normalize"].choices)
LIMITED = ("fira", "apollo", "alice")
SHAPES = {
    "left": ((12, 20), {}),
    "right": ((20, 12), {}),
    "reverse_std": ((20, 12), {"proj_type": "reverse_std"}),
    "full": ((12, 20), {"proj_type": "full"}),
    "stack": ((3, 12, 20), {"layout": "stack"}),
    "reshape": ((20, 6, 2), {"layout": "reshape"}),
    "tucker": ((12, 10, 3, 3), {}),
}

every_residual = pytest.mark.parametrize("residual", RESIDUALS)


def made(trained, kind=GaLoreAdamW, **keys):
    arguments = {"lr": keys.pop("lr", 0.1)} | ({"weight_decay": 0.0} if kind is GaLoreAdamW else {})
    group = {"params": trained, "rank": 4, "update_proj_gap": 3, "scale": 1.0, **keys}
    return kind([group], **arguments)


def momentum(trained, **keys):
    group = {"params": trained, "rank": 4, "update_proj_gap": 3, "scale": 1.0, **keys}
    return GaLore([group], optimizer_class=torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)


@every_residual
@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.broad
def test_a_residual_is_what_projecting_misses(layout, residual):
    """One step of Adam, whose direction is the sign of the projected gradient: S formed and scaled slice by slice."""
    shape, keys = SHAPES[layout]
    (weight,) = weights(shape, dtype=torch.float64)
    optimizer, before, grad = made([weight], residual=residual, **keys), weight.detach().clone(), gradient(weight, 1, 0)
    weight.grad = grad.clone()
    optimizer.step()
    projection, basis = projection_in(optimizer.param_groups[0], weight), optimizer.state[weight][BASIS]
    projected = projection.project(grad, basis)
    missed = (grad - projection.project_back(projected, basis)).view(projection.view_shape)
    psi, axes = projected / (projected.abs() + 1e-8), [mode.axis for mode in projection.modes]

    def energy(tensor):
        return tensor.square().sum(axes, keepdim=True)

    scaled = (energy(psi) / energy(projected)).sqrt()
    lost = sum_of(torch.ones_like(missed), axes) - sum_of(torch.ones_like(projected), axes)
    if layout == "tucker":
        lost = 12 * 10 - 4 * 4  # of the axes that are projected
    outside = {
        "fira": scaled * missed,
        "apollo": scaled * grad.view(projection.view_shape),
        "alice": (lost / (0.1 * energy(missed))).sqrt() * missed,
        "sign": missed.sign(),
        "full": missed,
    }[residual].view(shape)
    inside = 0 if residual == "apollo" else projection.project_back(psi, basis)
    torch.testing.assert_close(weight.detach(), before - 0.1 * (inside + outside), rtol=1e-9, atol=1e-9)


def sum_of(ones, axes):
    return ones.sum(axes).flatten()[0]


@pytest.mark.parametrize("residual", [None, "full"])
@pytest.mark.parametrize("layout", SHAPES)
def test_columns_of_a_normalized_update_have_a_size_of_one(layout, residual):
    shape, keys = SHAPES[layout]
    (weight,) = weights(shape, dtype=torch.float64)
    optimizer, before = made([weight], residual=residual, normalize="columns", **keys), weight.detach().clone()
    walk(optimizer, [weight], [1])
    moved = (weight.detach() - before) / 0.1
    outputs = 0 if layout in ("tucker", "reshape") else -2
    sizes = moved.square().mean(outputs).sqrt()
    torch.testing.assert_close(sizes, torch.ones_like(sizes), rtol=1e-6, atol=0)


@pytest.mark.parametrize("residual", [None, "full"])
@pytest.mark.parametrize("layout", SHAPES)
def test_an_orthogonal_update_has_equal_singular_values(layout, residual):
    shape, keys = SHAPES[layout]
    (weight,) = weights(shape, dtype=torch.float64)
    optimizer, before = made([weight], residual=residual, normalize="orthogonal", **keys), weight.detach().clone()
    walk(optimizer, [weight], [1])
    moved = (weight.detach() - before) / 0.1
    moved = moved if layout == "stack" else moved.flatten(1)
    values = torch.linalg.svdvals(moved) / max(moved.shape[-2:]) ** 0.5
    kept = values if residual or layout == "tucker" else values[..., :4]
    assert kept.max() < 1.3
    assert kept.min() > (0.5 if layout != "tucker" or residual else -1)


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("moments", KEYS["moments"].choices)
@pytest.mark.parametrize("residual", [None, *RESIDUALS])
@pytest.mark.broad
def test_it_resumes_bit_for_bit(residual, moments, size):
    keys = {"residual": residual, "moments": moments, "normalize": size, "residual_scale": 0.5}
    trained = weights((12, 20), (20, 12))
    optimizer = made(trained, **keys)
    walk(optimizer, trained, range(8))
    others = [nn.Parameter(weight.detach().clone()) for weight in trained]
    resumed = made(others, **keys)
    resumed.load_state_dict(saved(optimizer))
    for one, each in ((optimizer, trained), (resumed, others)):
        walk(one, each, range(8, 13))
    assert_same(snapshot(resumed)[:2], snapshot(optimizer)[:2])


@every_residual
def test_inside_the_backward_it_is_what_it_is_at_the_step(residual):
    ends = []
    for update in ("step", "backward"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Tanh(), nn.Linear(20, 12, bias=False)).double()
        optimizer = made(list(model.parameters()), residual=residual, moments="rotate", normalize="columns")
        attach(model, optimizer, gradients="full", update=update)
        for _ in range(8):
            model(torch.randn(16, 12, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([weight.detach() for weight in model.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.learning
@pytest.mark.parametrize("size", KEYS["normalize"].choices)
@pytest.mark.parametrize("gradients", ["fused", "projected", "full"])
@pytest.mark.broad("fused-columns", "projected-orthogonal", "full-blocks")
def test_without_a_residual_projected_gradients_are_enough(gradients, size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Linear(20, 12, bias=False))
    optimizer = momentum(list(model.parameters()), normalize=size, moments="rotate")
    with attach(model, optimizer, gradients):
        losses = []
        for _ in range(20):
            loss = model(torch.ones(1, 12)).square().mean()
            loss.backward()
            optimizer.param_groups[0]["lr"] = 0.01
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]  # 0.00 to 0.13 of it, over sizes and three seeds


class WritesIntoGradients(torch.optim.SGD):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad.mul_(2), alpha=group["lr"])


def test_a_rule_that_writes_into_its_gradient_has_the_right_residual():
    ends = []
    for rule, rate in ((torch.optim.SGD, 0.2), (WritesIntoGradients, 0.1)):
        (weight,) = weights((12, 20))
        group = {"params": [weight], "rank": 4, "residual": "full", "residual_scale": 1 if rate == 0.2 else 2}
        walk(GaLore([group], optimizer_class=rule, lr=rate), [weight], range(2))
        ends.append(weight.detach())
    torch.testing.assert_close(*ends)


@every_residual
@pytest.mark.parametrize("size", SIZES)
def test_zeros_and_a_rate_of_zero_leave_everything_finite_and_no_limit(residual, size):
    (weight,) = weights((12, 20))
    optimizer, before = made([weight], residual=residual, normalize=size), weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)
    optimizer.param_groups[0]["lr"] = 0.0
    walk(optimizer, [weight], [1])
    assert torch.equal(weight, before)
    optimizer.param_groups[0]["lr"] = 0.1
    walk(optimizer, [weight], [2])
    assert weight.isfinite().all()
    assert not torch.equal(weight, before)
    state = optimizer.state[weight]
    assert (RESIDUAL_NORM in state) == (residual in LIMITED)
    assert (RESIDUAL_ENERGY in state) == (residual == "alice")
    if residual in LIMITED:
        held = state[RESIDUAL_NORM].clone()
        assert held > 0
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        assert state[RESIDUAL_NORM] == held


@pytest.mark.parametrize("residual", LIMITED)
def test_a_residual_grows_by_one_percent_a_step_at_most(residual):
    (weight,) = weights((12, 20))
    optimizer = made([weight], residual=residual, update_proj_gap=100)
    walk(optimizer, [weight], range(3))
    held = float(optimizer.state[weight][RESIDUAL_NORM])
    weight.grad = 1e4 * gradient(weight, 3, 0)
    weight.grad[:, 0] *= 100
    optimizer.step()
    assert float(optimizer.state[weight][RESIDUAL_NORM]) <= 1.0101 * held


@every_residual
def test_maximizing_is_minimizing_the_opposite(residual):
    ends = []
    for sign in (1, -1):
        (weight,) = weights((12, 20))
        optimizer = made([weight], residual=residual, maximize=sign < 0)
        for step in range(3):
            weight.grad = sign * gradient(weight, step, 0)
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends)


@every_residual
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.broad
def test_a_rate_in_a_tensor_is_that_rate(residual, size):
    ends = []
    for rate in (0.1, torch.tensor(0.1)):
        (weight,) = weights((12, 20))
        walk(made([weight], residual=residual, normalize=size, lr=rate), [weight], range(3))
        ends.append(weight.detach())
    torch.testing.assert_close(*ends)


@every_residual
def test_l2_decay_is_part_of_the_gradient_outside_too(residual):
    ends = []
    for decay in (0.1, 0.0):
        (weight,) = weights((12, 20), dtype=torch.float64)
        optimizer = momentum([weight], residual=residual, decomposition="random", weight_decay=decay)
        for step in range(3):
            grad = gradient(weight, step, 0)
            weight.grad = grad if decay else grad + 0.1 * weight.detach()
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends)


def test_one_factor_is_for_the_whole_matrix_at_rank_one():
    (weight,) = weights((12, 20))
    optimizer, before = made([weight], residual="apollo", rank=1), weight.detach().clone()
    walk(optimizer, [weight], [0])
    moved, grad = weight.detach() - before, gradient(weight, 0, 0)
    torch.testing.assert_close(moved, grad * (moved.norm() / -grad.norm()))


@every_residual
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.broad
def test_in_sixteen_bits_it_is_that_of_float32_to_rounding(residual, size, rounding):
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        (weight,) = weights((40, 24), dtype=torch.bfloat16)
        weight = nn.Parameter(weight.detach().to(dtype))
        # The exact basis: one that is iterated for turns within directions that are nearly as strong, and axes matter.
        keys = {"decomposition": "svd", "residual": residual, "normalize": size}
        group = {"params": [weight], "rank": 8, "scale": 1.0, **keys}
        optimizer = GaLoreAdamW([group], lr=0.05, rounding=rounding if dtype is torch.bfloat16 else "nearest")
        for step in range(3):
            weight.grad = gradient(weight, step, 0).bfloat16().to(dtype)
            optimizer.step()
        ends.append(weight.detach().float())
    apart = 0.2 if residual == "sign" else 0.1  # signs of what is nearly zero turn
    assert (ends[0] - ends[1]).norm() < apart * (ends[0] - weights((40, 24))[0]).norm()


@every_residual
def test_it_moves_weights_in_int8(residual):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, bias=False))
    plain = nn.Parameter(model[0].weight.detach().clone())
    quantize_weights(model, target_modules="all-linear", stochastic_rounding=False)
    quantized, ends = model[0].weight, []
    for weight in (quantized, plain):
        optimizer = made([weight], residual=residual, normalize="columns", lr=0.05)
        before = weight.detach().clone() if weight is plain else weight.dequantize()
        weight.grad = gradient(plain, 0, 0)
        optimizer.step()
        ends.append((weight if weight is plain else weight.dequantize()).detach() - before)
    assert (ends[0] - ends[1]).norm() < 0.1 * ends[1].norm()


@pytest.mark.parametrize("residual", ["fira", "full"])
def test_adafactor_moves_at_its_own_rate(residual):
    (weight,), (twin,) = weights((12, 20)), weights((12, 20))
    for one, lr in ((weight, 0.02), (twin, 0.01)):
        optimizer = made([one], GaLoreAdafactor, residual=residual, lr=lr)
        walk(optimizer, [one], [0])
    start = weights((12, 20))[0]
    torch.testing.assert_close(weight - start, 2 * (twin - start), rtol=1e-3, atol=1e-5)
