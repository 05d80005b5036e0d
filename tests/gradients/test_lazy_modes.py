"""Lazy renewal under every mode: the same renewals as with plain steps, constant over a window, and exact on resume."""

from __future__ import annotations

import functools
import io
import itertools

import pytest
import torch
from torch import nn

from galore_torch import GaLore
from galore_torch.gradients import attach
from tests.gradients.llama import BAR, adamw, distance, every_accumulating_mode, llama, trained, walk
from tests.modes import every_mode
from tests.optim.small import assert_same

one_layer = functools.partial(llama, num_hidden_layers=1)
STEPS, SAVED_AT, GAP = 24, 11, 2


def lazy(model: nn.Module) -> GaLore:
    """Some layers grow their gaps, some shrink them again, some keep them."""
    return adamw(model, update_proj_gap=GAP, cos_threshold=0.25, queue_size=2)


@functools.cache
def plain(micro_batches: int = 1) -> tuple[nn.Module, GaLore, list[list[int]]]:
    return run(None, micro_batches)


def run(mode: tuple[str, str] | None, micro_batches: int = 1) -> tuple[nn.Module, GaLore, list[list[int]]]:
    """A model, its optimizer, and the gaps of all layers after each step."""
    model = one_layer()
    optimizer = lazy(model)
    if mode is not None:
        attach(model, optimizer, *mode)
    return model, optimizer, [gaps(model, optimizer, step, micro_batches) for step in range(STEPS)]


def gaps(model: nn.Module, optimizer: GaLore, step: int, micro_batches: int = 1) -> list[int]:
    walk(model, optimizer, [step], micro_batches)
    return [one.gap for one in optimizer.subspaces().values()]


def test_here_gaps_grow_and_shrink_and_differ():
    history = plain()[2]
    by_layer = list(zip(*history, strict=True))
    assert len(set(by_layer)) > 2
    assert any(later > earlier for own in by_layer for earlier, later in itertools.pairwise(own))
    assert any(later < earlier for own in by_layer for earlier, later in itertools.pairwise(own))


@every_mode
@pytest.mark.broad("projected, at step", "fused, in backward")
def test_renewals_are_those_of_plain_steps(mode):
    model, optimizer, history = run(mode)
    theirs, other, expected = plain()
    assert history == expected
    counts = ([state["renewals"] for state in one.state.values() if "renewals" in state] for one in (optimizer, other))
    assert len({tuple(sorted(one)) for one in counts}) == 1
    if mode[0] == "fused":
        assert distance(model, theirs) <= BAR
    else:
        assert_same(list(model.parameters()), list(theirs.parameters()))


@every_accumulating_mode
@pytest.mark.broad("fused, at step")
def test_windows_of_micro_batches(mode):
    """A layer whose turn comes keeps its full gradient for the whole window, whatever its own gap."""
    model, _, history = run(mode, micro_batches=4)
    theirs, _, expected = plain(micro_batches=4)
    assert history == expected
    assert distance(model, theirs) <= BAR
    assert distance(model, plain()[0]) <= BAR


@every_mode
@pytest.mark.broad("projected, at step")
def test_resuming_is_exact(mode):
    whole = run(mode)
    model = one_layer()
    optimizer = lazy(model)
    attach(model, optimizer, *mode)
    history = [gaps(model, optimizer, step) for step in range(SAVED_AT)]
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = one_layer()
    other = lazy(resumed)
    attach(resumed, other, *mode)
    for part, state in zip((resumed, other), saved, strict=True):
        part.load_state_dict(state)
    history += [gaps(resumed, other, step) for step in range(SAVED_AT, STEPS)]
    assert history == whole[2]
    assert distance(resumed, whole[0]) <= (1e-6 if mode[0] == "fused" else 0)


def test_recomputed_forwards_decide_the_same():
    """Gradient checkpointing runs a layer's forward again inside the backward, where others have been applied."""
    ends = []
    for recomputes in (False, True):

        def make(recomputes: bool = recomputes) -> nn.Module:
            model = one_layer()
            if recomputes:
                model.gradient_checkpointing_enable()
            return model.train()

        ends.append(trained(("fused", "backward"), lazy, make))
    assert distance(*ends) <= BAR
