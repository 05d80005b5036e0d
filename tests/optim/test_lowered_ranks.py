"""Ranks that are lowered in mid-training: what is left, what it frees, and what is refused."""

import copy

import pytest
import torch
from torch import nn

from galore_torch import GaLore, GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreMuon, attach, lower_ranks
from galore_torch.optim import state_bytes
from tests.modes import every_mode
from tests.optim.small import assert_same, snapshot, walk, weights

LAYOUTS = {
    "left": ((12, 20), {}),
    "right": ((20, 12), {}),
    "full": ((12, 20), {"proj_type": "full"}),
    "stack": ((3, 12, 20), {"layout": "stack"}),
    "tucker": ((12, 10, 3, 3), {}),
}


def made(trained, kind=GaLoreAdamW, rank=6, lr=0.05, **keys):
    names = [f"{index}.mlp.weight" for index in range(len(trained))]
    return kind([{"params": trained, "param_names": names, "rank": rank, "update_proj_gap": 4, **keys}], lr=lr)


def cut(tensor, shape):
    return tensor[tuple(slice(0, size) for size in shape)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [GaLoreAdamW, GaLoreMuon, GaLoreAdafactor])
@pytest.mark.broad
def test_it_goes_on_as_an_optimizer_of_the_lower_rank_that_has_the_first_directions(kind, layout):
    shape, keys = LAYOUTS[layout]
    trained = weights(shape)
    optimizer = made(trained, kind, **keys)
    walk(optimizer, trained, range(6))
    others = [nn.Parameter(weight.detach().clone()) for weight in trained]
    lower = made(others, kind, rank=3, **keys)
    walk(lower, others, range(6))
    (mine,), (other,) = trained, others
    state, theirs = optimizer.state[mine], lower.state[other]
    with torch.no_grad():
        other.copy_(mine)
    for name, factor in theirs["basis"].items():
        factor.copy_(cut(state["basis"][name], factor.shape))
    for name, value in theirs["inner"].items():
        if isinstance(value, torch.Tensor):
            value.copy_(cut(state["inner"][name], value.shape) if value.dim() else state["inner"][name])
    for name in ("overlaps", "captured"):
        theirs[name].copy_(state[name])
    lower_ranks(optimizer, {"mlp": 3})
    assert optimizer.param_groups[0]["rank"] == 3
    assert_same(snapshot(optimizer)[1], snapshot(lower)[1])
    for one, each in ((optimizer, trained), (lower, others)):
        walk(one, each, range(6, 12))
    assert_same(snapshot(optimizer)[:2], snapshot(lower)[:2])


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_its_memory_is_free_at_once(bits):
    sizes = {}
    for rank in (32, 8):
        trained = weights((128, 256), (256, 128))
        optimizer = made(trained, rank=rank, basis_bits=bits)
        walk(optimizer, trained, range(2))
        sizes[rank] = state_bytes(optimizer)
        if rank == 32:
            lower_ranks(optimizer, {"mlp": 8})
            lowered = state_bytes(optimizer)
            walk(optimizer, trained, range(2, 8))
            assert state_bytes(optimizer) == lowered
    assert lowered == sizes[8] < 0.3 * sizes[32]


def test_groups_that_no_name_fits_stay_as_they_are():
    projected, other, plain = weights((12, 20), (20, 12), (16,))
    groups = [
        {"params": [projected], "param_names": ["mlp.weight"], "rank": 6},
        {"params": [other], "param_names": ["attn.weight"], "rank": 5},
        {"params": [plain], "param_names": ["norm.weight"]},
    ]
    optimizer = GaLoreAdamW(groups, lr=0.05)
    walk(optimizer, [projected, other, plain], range(2))
    kept = [snapshot(optimizer)[1][index] for index in (1, 2)]
    lower_ranks(optimizer, {"mlp": 2})
    assert [group.get("rank") for group in optimizer.param_groups] == [2, 5, None]
    assert "rank" not in optimizer.param_groups[2]
    assert_same([snapshot(optimizer)[1][index] for index in (1, 2)], kept)


@every_mode
def test_an_attached_model_goes_on(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Tanh(), nn.Linear(20, 12, bias=False))
    optimizer = made(list(model.parameters()), lr=0.02)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    attach(model, optimizer, *mode)
    losses = []
    for step in range(16):
        loss = (model(torch.ones(1, 12)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(float(loss.detach()))
        if step == 7:
            lower_ranks(optimizer, {"mlp": 2})
    assert optimizer.state[model[0].weight]["inner"]["exp_avg"].shape == (20, 2)
    assert losses[-1] < losses[8] < losses[0]


def test_it_resumes_bit_for_bit_at_the_lower_rank():
    trained = weights((12, 20), (20, 12))
    optimizer = made(trained)
    walk(optimizer, trained, range(5))
    lower_ranks(optimizer, {"0.mlp": 2, "mlp": 2})
    walk(optimizer, trained, range(5, 7))
    others = [nn.Parameter(weight.detach().clone()) for weight in trained]
    resumed = made(others, rank=2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, each in ((optimizer, trained), (resumed, others)):
        walk(one, each, range(7, 12))
    assert_same(snapshot(resumed)[:2], snapshot(optimizer)[:2])


class Keeper(torch.optim.SGD):
    """Keeps a tensor of which nobody knows what it is."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"])
                self.state[parameter]["secret"] = parameter.grad.clone()


def keeper(groups, lr):
    return GaLore(groups, optimizer_class=Keeper, lr=lr)


def eight_bit(groups, lr):
    return GaLoreAdamW8bit(groups, lr=lr, min_8bit_size=16)


@pytest.mark.parametrize(
    ("kind", "pattern", "words"),
    [
        (GaLoreAdamW, {"mlp": 7}, r"rank of 0\.mlp\.weight is 6, which 7 would not lower"),
        (GaLoreAdamW, {"0.mlp": 3}, r"gives parameter group 0 ranks of \[3, 6\]"),
        (GaLoreAdamW, {"lp": 3}, "name ends by lp"),
        (GaLoreAdamW, {"mlp": 0}, "rank is 0"),
        (keeper, {"mlp": 3}, r"Keeper keeps secret of 0\.mlp\.weight .* cannot be cut to rank 3"),
        (eight_bit, {"mlp": 3}, r"keeps state1 of 0\.mlp\.weight in few bits, .* cannot be cut to rank 3"),
    ],
)
def test_what_cannot_be_lowered_is_refused_and_nothing_has_changed(kind, pattern, words):
    if kind is eight_bit:
        pytest.importorskip("bitsandbytes")
    trained = weights((64, 128), (128, 64))
    optimizer = made(trained, kind)
    walk(optimizer, trained, range(3))
    *before, values = snapshot(optimizer)
    with pytest.raises(ValueError, match=words):
        lower_ranks(optimizer, pattern)
    *after, still = snapshot(optimizer)
    assert_same(after, before)
    assert still == values
    walk(optimizer, trained, range(3, 5))


def test_a_projected_gradient_that_waits_is_refused():
    model = nn.Sequential(nn.Linear(12, 20, bias=False))
    optimizer = made(list(model.parameters()))
    attach(model, optimizer, "fused")
    for _ in range(2):
        model(torch.ones(1, 12)).square().mean().backward()
        optimizer.step()
    with pytest.raises(ValueError, match=r"grad of 0\.mlp\.weight waits at rank 6; call zero_grad"):
        lower_ranks(optimizer, {"mlp": 3})


def test_a_convolution_whose_short_axes_would_be_projected_is_refused():
    trained = weights((12, 10, 3, 3))
    optimizer = made(trained)
    walk(optimizer, trained, range(2))
    with pytest.raises(ValueError, match=r"rank of 0\.mlp\.weight: at 2 more of its axes would be projected"):
        lower_ranks(optimizer, {"mlp": 2})
    assert optimizer.param_groups[0]["rank"] == 6


@pytest.mark.parametrize("given", [None, torch.nn.Linear(2, 2), torch.optim.SGD([torch.zeros(1)], lr=1)])
def test_what_is_no_galore_optimizer_is_refused(given):
    with pytest.raises(ValueError, match=rf"optimizer is a {type(given).__name__};.*\.optimizer"):
        lower_ranks(given, {"up": 2})


def test_groups_without_names_are_refused():
    optimizer = GaLoreAdamW([{"params": weights((12, 20)), "rank": 4}])
    with pytest.raises(ValueError, match="parameter group 0 has no param_names"):
        lower_ranks(optimizer, {"mlp": 3})
