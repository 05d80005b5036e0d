"""`GaLoreMuon`: its equations, the keys that it fills in, and what it keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim import AdamW
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, _zeropower_via_newtonschulz

from galore_torch import GaLoreAdamW, GaLoreMuon, devices, param_groups
from galore_torch.optim.normalize import _orthogonal
from tests.optim.small import mixed, refusing

pytestmark = pytest.mark.filterwarnings("ignore:rank .* saves no memory")


def test_muon_of_low_rank_orthogonalizes_momentum_and_residual_together():
    """Its equations, written down with dense projections; over renewals, in float64."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(16, 24, dtype=torch.float64))
    optimizer = GaLoreMuon([{"params": [weight], "rank": 4, "update_proj_gap": 3}], lr=0.05, weight_decay=0.1)
    expected, momentum = weight.detach().clone(), torch.zeros(16, 24, dtype=torch.float64)
    for _ in range(8):
        whole = torch.randn(16, 24, dtype=torch.float64)
        weight.grad = whole.clone()
        optimizer.step()
        (basis,) = optimizer.state[weight]["basis"].values()
        inside = basis @ basis.T
        momentum = 0.9 * inside @ momentum + inside @ whole
        whole = inside @ whole + 0.9 * momentum + 10.0 * (whole - inside @ whole)
        left, _, right = torch.linalg.svd(whole, full_matrices=False)
        expected.mul_(1 - 0.05 * 0.1)
        moved = (expected - weight.detach()) / (0.05 * 0.2 * math.sqrt(24))
        singular = left.T @ moved @ right.T  # Newton-Schulz leaves directions and brings sizes near 1
        torch.testing.assert_close(singular, singular.diagonal().diag(), atol=0.05, rtol=0)
        assert 0.6 < singular.diagonal().min() <= singular.diagonal().max() < 1.3
        expected = weight.detach().clone()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 24, 40)])
def test_where_bfloat16_is_fast_torchs_own_newton_schulz_is_what_is_computed(shape, device, monkeypatch):
    monkeypatch.setattr(devices, "cpu_multiplies_bfloat16", lambda: True)
    matrices = torch.randn(shape, device=device)
    each = matrices.reshape(-1, *shape[-2:])
    expected = torch.stack(
        [_zeropower_via_newtonschulz(one, (DEFAULT_A, DEFAULT_B, DEFAULT_C), 5, 1e-7) for one in each]
    )
    off = 0 if device == "cpu" else 0.02  # a GPU rounds the products of several matrices otherwise
    torch.testing.assert_close(_orthogonal(matrices), expected.float().view(shape), rtol=0, atol=off)
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda _: False)
    torch.testing.assert_close(_orthogonal(matrices), expected.float().view(shape), rtol=0, atol=0.03)


@pytest.mark.parametrize("written_out", [True, False], ids=["param_groups", "bare"])
def test_muon_of_low_rank_fills_in_what_a_group_does_not_say(written_out):
    made = torch.nn.ModuleDict({"mlp": torch.nn.Linear(8, 16, bias=False), "head": torch.nn.Linear(16, 4)})
    bare = [{"params": [made["mlp"].weight], "rank": 4}, {"params": [*made["head"].parameters()]}]
    given = param_groups(made, rank=4) if written_out else bare
    optimizer = GaLoreMuon(given, momentum=0.95)
    own = {"scale": 0.2, "residual": "full", "moments": "rotate", "normalize": "orthogonal"}
    assert own.items() <= optimizer.param_groups[0].items()
    assert optimizer.param_groups[0]["residual_scale"] == pytest.approx(20)
    said = {"scale": 0.3, "residual": "sign", "residual_scale": 0.5, "moments": "reset", "normalize": "columns"}
    assert said.items() <= GaLoreMuon([{**bare[0], **said}]).param_groups[0].items()
    assert optimizer.param_groups[1].keys() & own.keys() == set()


def test_muon_of_low_rank_moves_the_rest_as_adamw_does():
    ours, theirs = (torch.nn.Parameter(torch.arange(6.0)) for _ in range(2))
    matrix = torch.nn.Parameter(torch.randn(8, 8))
    one = GaLoreMuon([{"params": [matrix], "rank": 2}, {"params": [ours]}], lr=0.1, weight_decay=0.1)
    other = AdamW([theirs], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        ours.grad = torch.randn(6)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    torch.testing.assert_close(ours, theirs)


def test_muon_of_low_rank_keeps_half_of_the_moments():
    numbers = {}
    for kind in (GaLoreAdamW, GaLoreMuon):
        weight = torch.nn.Parameter(torch.randn(64, 32))
        weight.grad = torch.randn(64, 32)
        optimizer = kind([{"params": [weight], "rank": 8}])
        optimizer.step()
        kept = optimizer.state[weight]["inner"].values()
        numbers[kind] = sum(one.numel() for one in kept if one.numel() > 1)
    assert 2 * numbers[GaLoreMuon] == numbers[GaLoreAdamW]


@pytest.mark.parametrize("momentum", [0, 1, -0.5])
def test_muon_of_low_rank_needs_momentum(momentum):
    assert f"momentum is {momentum}" in refusing(lambda: GaLoreMuon(mixed()[1], momentum=momentum))
