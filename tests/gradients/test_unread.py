"""No step waits for the device, whichever layers renew in it: what of a renewal the host must know it is told later."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from galore_torch import GaLoreAdamW, GaLoreSGD, attach, devices, param_groups
from galore_torch.optim.outcomes import Reading
from tests.modes import every_mode
from tests.optim.small import gradient, state_of, weights
from tests.reads import Reads

SIZES = (24, 32, 16, 24)
pytestmark = pytest.mark.filterwarnings("ignore:rank .* saves no memory")


@pytest.fixture(autouse=True)
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bases as they are found where the host runs ahead of the device, on any device."""
    monkeypatch.setattr(devices, "runs_ahead", lambda _: True)


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps that have ended. What is sent to the host is read in a later one than it was sent in."""
    ended = [0]
    sent: dict[int, int] = {}
    init, read = Reading.__init__, Reading.read

    def send(self: Reading, numbers: Tensor) -> None:
        sent[id(self)] = ended[0]
        init(self, numbers)

    def receive(self: Reading) -> list[float]:
        assert sent[id(self)] < ended[0]
        return read(self)

    monkeypatch.setattr(Reading, "__init__", send)
    monkeypatch.setattr(Reading, "read", receive)
    return ended


def net() -> nn.Sequential:
    layers = [nn.Linear(*size, bias=False) for size in itertools.pairwise(SIZES)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


KINDS: dict[str, dict[str, Any]] = {
    "warm": {},
    "both sides": {"proj_type": "full", "decomposition": "randomized"},
    "random": {"decomposition": "random"},
    "lazy": {"cos_threshold": 0.4, "queue_size": 2, "update_proj_gap": 5},
    "rotated": {"moments": "rotate"},
    "few bits": {"basis_bits": 8, "basis_group_size": 32},
}


@every_mode
@pytest.mark.parametrize("keys", KINDS.values(), ids=KINDS)
@pytest.mark.broad
def test_nothing_is_read_back_in_any_step(mode, keys, readings):
    assert_unread(mode, keys, 24, 8, readings)


@pytest.mark.slow
@every_mode
@pytest.mark.broad("full, in backward", "fused, at step")
def test_nothing_is_read_back_in_400_steps(mode, readings):
    assert_unread(mode, {}, 400, 40, readings)


def assert_unread(mode: tuple[str, str], keys: dict[str, Any], steps: int, gap: int, readings: list[int]) -> None:
    torch.manual_seed(0)
    model = net()
    groups = param_groups(model, rank=4, target_modules="all-linear", **{"update_proj_gap": gap, **keys})
    optimizer = GaLoreAdamW(groups, lr=1e-2, fused=True)
    x, y = torch.randn(64, SIZES[0]), torch.randn(64, SIZES[-1])
    with attach(model, optimizer, gradients=mode[0], update=mode[1]):
        for step in range(steps):
            with Reads() as reads:
                (model(x) - y).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            assert reads.where == [], step
            readings[0] += 1
    renewals = [one.renewals for one in optimizer.subspaces().values()]
    assert len(renewals) == 3
    assert min(renewals) >= (2 if "cos_threshold" in keys else steps // gap)


def test_a_run_is_that_of_a_device_that_is_read(monkeypatch):
    """Renewals, gaps and overlaps are those of the host that waits, with gradients that it cannot renew from."""
    ends = []
    for is_ahead in (True, False):
        monkeypatch.setattr(devices, "runs_ahead", lambda _, is_ahead=is_ahead: is_ahead)
        (weight,) = weights((24, 16))
        optimizer = GaLoreSGD([{"params": [weight], "rank": 4, "update_proj_gap": 3, **KINDS["lazy"]}], lr=0.0)
        seen = []
        for step in range(40):
            weight.grad = gradient(weight, 0 if step % 9 else step, 0)
            if step in (0, 1, 7, 21, 22):
                weight.grad.fill_(float("nan") if step % 2 else 0.0)
            optimizer.step()
            state = state_of(optimizer, weight)
            seen.append({key: state[key] for key in ("renewals", "renewed_step", "gap", "lacking")})
        ends.append(seen)
    assert ends[0] == ends[1]


def test_a_checkpoint_knows_what_has_become_of_the_last_renewal():
    """Saved right after a gradient that was not finite, and gone on from: bit for bit the run that was not saved."""

    def step(optimizer: GaLoreAdamW, weight: Tensor, number: int) -> None:
        weight.grad = gradient(weight, number, 0)
        if number == 4:
            weight.grad.fill_(float("inf"))
        optimizer.step()

    group = {"rank": 4, "update_proj_gap": 4, "stagger": False}
    made = [weights((24, 16))[0] for _ in range(2)]
    whole, first = (GaLoreAdamW([{"params": [one], **group}], lr=0.1, skip_nonfinite=True) for one in made)
    for number in range(5):
        step(whole, made[0], number)
        step(first, made[1], number)
    saved = copy.deepcopy(first.state_dict())
    assert saved["state"][0]["renewals"] == 1
    resumed = GaLoreAdamW([{"params": [made[1]], **group}], lr=0.1, skip_nonfinite=True)
    resumed.load_state_dict(saved)
    for number in range(5, 12):
        step(whole, made[0], number)
        step(resumed, made[1], number)
    assert torch.equal(*made)
    assert state_of(whole, made[0])["renewals"] == state_of(resumed, made[1])["renewals"] == 3


def test_a_gradient_of_too_few_directions_leaves_its_turn_to_the_next():
    (weight,) = weights((24, 16))
    optimizer = GaLoreSGD([{"params": [weight], "rank": 4, "update_proj_gap": 3, "stagger": False}], lr=0.1)
    renewed = []
    for step in range(8):
        grad = gradient(weight, step, 0)
        weight.grad = grad if step != 3 else grad[:, :1] * torch.ones(1, 16)
        optimizer.step()
        renewed.append(state_of(optimizer, weight)["renewed_step"])
    assert renewed == [0, 0, 0, 0, 4, 4, 6, 6]
    assert state_of(optimizer, weight)["lacking"] == 0


@pytest.mark.parametrize(
    "keys", [{}, {"proj_type": "full"}, {"moments": "rotate"}, {"decomposition": "tracked"}], ids=str
)
def test_what_gradients_do_not_tell_stays_and_nothing_is_read_back(keys, readings):
    """Of rank 2 where the basis has 4 columns: from the second turn on, the old directions stay beside the new ones."""
    (weight,) = weights((24, 16))
    group = {"params": [weight], "rank": 4, "update_proj_gap": 3, "stagger": False, **keys}
    optimizer, renewed = GaLoreAdamW([group], lr=0.1, fused=True), []
    for step in range(11):
        torch.manual_seed(step)
        weight.grad = torch.randn(24, 16) if step == 0 else torch.randn(24, 2) @ torch.randn(2, 16)
        trained = optimizer._trained_weight(weight) if step else None
        before = dict(trained.basis) if step else {}
        with Reads() as reads:
            optimizer.step()
        assert reads.where == []
        readings[0] += 1
        trained = optimizer._trained_weight(weight)
        for name, factor in trained.basis.items() if step in (4, 6, 9) else ():
            torch.testing.assert_close(factor.mT @ factor, torch.eye(4), rtol=0, atol=1e-5)
            assert not torch.equal(factor, before[name])
            kept = torch.linalg.svdvals(factor.mT @ before[name])
            assert kept[1] > 0.95
            held = factor @ (factor.mT @ weight.grad) if name == "left" else weight.grad @ factor @ factor.mT
            torch.testing.assert_close(held, weight.grad, rtol=1e-3, atol=1e-3)
        renewed.append(state_of(optimizer, weight)["renewed_step"])
    assert renewed == [0, 0, 0, 0, 4, 4, 6, 6, 6, 9, 9]
    assert state_of(optimizer, weight)["lacking"] == -1
