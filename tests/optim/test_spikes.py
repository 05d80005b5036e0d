"""A batch of garbage in mid-training: how far it throws a model back, for how long, and a resumed run after it."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from galore_torch import GaLoreAdamW, GaLoreMuon, param_groups
from galore_torch.optim.residual import GROWTH, LIMITED
from galore_torch.optim.state_keys import RESIDUAL_NORM
from tests.gradients.llama import TOKENS, VOCABULARY, llama, loss_of
from tests.optim.small import assert_same, snapshot

ROWS, SPIKE, RECOVERED = 16, 40, 20  # the batch of garbage comes in step 40, and 20 more follow
LAST = 5  # of these, which tell where a model has come to
SUCCESSORS = torch.randint(VOCABULARY, (VOCABULARY, 4), generator=torch.Generator().manual_seed(7))


def text(generator: torch.Generator, rows: int = ROWS) -> Tensor:
    """Sequences in which one of four tokens follows each: their loss is log 4 at best."""
    ids = torch.randint(VOCABULARY, (rows, TOKENS), generator=generator)
    successors = SUCCESSORS.to(ids.device)
    for place in range(1, TOKENS):
        ids[:, place] = successors[ids[:, place - 1], torch.randint(4, (rows,), generator=generator)]
    return ids


HELD_OUT = text(torch.Generator().manual_seed(99), rows=64)


def garbage(kind: str, seed: int) -> Tensor:
    """Tokens at random, or one and the same, whose gradient is the larger one."""
    if kind == "one token":
        return torch.full((ROWS, TOKENS), seed)
    return torch.randint(VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1000 + seed))


def optimizer_of(method: str, model: nn.Module) -> Optimizer:
    """One of the two at the better of the rates that were tried: the same for embeddings, head and norms."""
    groups = param_groups(model, rank=16, update_proj_gap=25, others_lr=5e-3)
    if method == "muon":
        return GaLoreMuon(groups, lr=8e-3)
    return AdamW([{"lr": 2e-3, **group} for group in groups], weight_decay=0.0)


def make_step(model: nn.Module, optimizer: Optimizer, ids: Tensor) -> None:
    loss_of(model, ids).backward()
    optimizer.step()
    optimizer.zero_grad()


def held_out(model: nn.Module) -> float:
    """The loss of held-out text."""
    with torch.no_grad():
        return float(loss_of(model, HELD_OUT.to(next(model.parameters()).device)))


def steps(model: nn.Module, optimizer: Optimizer, batches: Sequence[Tensor], told: int) -> list[float]:
    """The losses of held-out text after each of the last steps."""
    losses = []
    for left, ids in zip(range(len(batches), 0, -1), batches, strict=True):
        make_step(model, optimizer, ids)
        if left <= told:
            losses.append(held_out(model))
    return losses


@functools.cache
def losses(method: str, seed: int) -> tuple[float, dict[str, list[float]]]:
    """The loss before, and those of the steps from `SPIKE` on: undisturbed, and after each kind of garbage.

    Of AdamW only the last are asked for.
    """
    model, generator = llama(), torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.02, generator=generator)
    optimizer = optimizer_of(method, model)
    for _ in range(SPIKE):
        make_step(model, optimizer, text(generator))
    before = held_out(model)
    batches, ways = [text(generator) for _ in range(RECOVERED + 1)], {}
    for kind in ("undisturbed", "random", "one token"):
        own = copy.deepcopy(model)
        resumed = optimizer_of(method, own)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        first = batches[0] if kind == "undisturbed" else garbage(kind, seed)
        ways[kind] = steps(own, resumed, [first, *batches[1:]], len(batches) if method == "muon" else LAST)
    return before, ways


def setback(method: str, seed: int, kind: str) -> list[float]:
    """By how much the losses are above those of the undisturbed run."""
    _, ways = losses(method, seed)
    return [there - here for here, there in zip(ways["undisturbed"], ways[kind], strict=True)]


@pytest.mark.slow
@pytest.mark.learning
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["random", "one token"])
def test_muon_of_low_rank_recovers_from_garbage_within_twenty_steps(kind, seed):
    before, ways = losses("muon", seed)
    of_muon, of_adamw = (setback(method, seed, kind) for method in ("muon", "adamw"))
    assert max(of_muon) > 0.015  # it was a spike: 0.02 to 0.04 above the undisturbed run
    assert max(ways[kind][-LAST:]) < before - 0.02  # and is over: 0.04 to 0.12 below
    assert fmean(of_muon[-LAST:]) < 0.05  # at most 0.03 above the undisturbed run
    assert fmean(of_muon[-LAST:]) < fmean(of_adamw[-LAST:]) + 0.03  # at most 0.015 more than AdamW's
    assert fmean(ways[kind][-LAST:]) < fmean(losses("adamw", seed)[1][kind][-LAST:])


@pytest.mark.parametrize("residual", LIMITED)
@pytest.mark.broad("fira")
def test_the_limiter_resumes_bit_for_bit_through_a_spike(residual):
    """Saved before the garbage, after its step, and while the limit still holds: each goes on as the whole run."""

    def made() -> tuple[nn.Module, GaLoreAdamW]:
        model = llama()
        groups = param_groups(model, rank=16, update_proj_gap=5, residual=residual, moments="rotate")
        return model, GaLoreAdamW(groups, lr=8e-3)

    generator = torch.Generator().manual_seed(0)
    batches = [text(generator) for _ in range(14)]
    batches[8] = garbage("one token", 3)
    model, optimizer = made()
    saved, norms = {}, []
    for step, ids in enumerate(batches):
        make_step(model, optimizer, ids)
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], file)
        saved[step] = file.getvalue()
        norms.append(torch.stack([own[RESIDUAL_NORM] for own in optimizer.state.values() if RESIDUAL_NORM in own]))
    grown = torch.stack([after / before for before, after in pairwise(norms)])
    assert len(norms[0]) == 14
    assert float(grown.max()) <= GROWTH + 1e-6
    assert bool((grown[7:10] > GROWTH - 1e-6).any())  # the garbage, and what follows it, are limited
    for step in (7, 8, 9):
        again, resumed = made()
        of_model, of_optimizer = torch.load(io.BytesIO(saved[step]), weights_only=True)
        again.load_state_dict(of_model)
        resumed.load_state_dict(of_optimizer)
        for ids in batches[step + 1 :]:
            make_step(again, resumed, ids)
        assert_same(snapshot(resumed)[:2], snapshot(optimizer)[:2])
