"""A run saved in one mode resumes in another, also in the middle of a window of micro-batches."""

from __future__ import annotations

import functools
import io
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from galore_torch import GaLore, ProjectedGradient
from galore_torch.gradients import attach
from tests.gradients.llama import ACCUMULATING, BAR, GAP, adamw, batch, distance, llama, loss_of, walk
from tests.modes import MODES, every_mode
from tests.optim.small import assert_same

one_layer = functools.partial(llama, num_hidden_layers=1)
PAIRS = list(itertools.permutations(MODES.values(), 2))
WINDOW_PAIRS = list(itertools.product(ACCUMULATING.values(), repeat=2))
SAVED_AT = GAP + 1
END = 2 * GAP + 2


def same_order(*modes: tuple[str, str]) -> bool:
    return all(gradients != "fused" for gradients, _ in modes)


def through_a_file(saved: object) -> object:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def started(mode: tuple[str, str]) -> tuple[nn.Module, GaLore, LambdaLR]:
    model = one_layer()
    optimizer = adamw(model)
    attach(model, optimizer, *mode)
    return model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def run(model: nn.Module, optimizer: GaLore, schedule: LambdaLR, steps: range) -> None:
    for step in steps:
        walk(model, optimizer, [step])
        schedule.step()


@functools.cache
def saved_in_the_middle(mode: tuple[str, str]) -> bytes:
    parts = started(mode)
    run(*parts, range(SAVED_AT))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    return file.getvalue()


@functools.cache
def uninterrupted(mode: tuple[str, str]) -> nn.Module:
    model, optimizer, schedule = started(mode)
    run(model, optimizer, schedule, range(END))
    return model


@pytest.mark.parametrize(("before", "after"), PAIRS, ids=str)
@pytest.mark.broad("('full', 'step')-('fused', 'backward')", "('fused', 'step')-('full', 'backward')")
def test_a_run_resumes_in_another_mode(before, after):
    saved = torch.load(io.BytesIO(saved_in_the_middle(before)), weights_only=True)
    resumed = started(after)
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    run(*resumed, range(SAVED_AT, END))
    if same_order(before, after):
        assert_same(list(resumed[0].parameters()), list(uninterrupted(before).parameters()))
    assert distance(resumed[0], uninterrupted(before)) <= BAR


@every_mode
def test_resuming_in_the_same_mode_is_exact(mode):
    saved = torch.load(io.BytesIO(saved_in_the_middle(mode)), weights_only=True)
    resumed = started(mode)
    walk(resumed[0], resumed[1], [99])  # whatever it did before is forgotten
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    run(*resumed, range(SAVED_AT, END))
    # What layers share an input is learnt anew, so the step after resuming saves inputs where it saved projected ones.
    assert distance(resumed[0], uninterrupted(mode)) <= (1e-6 if mode[0] == "fused" else 0)


@every_mode
def test_state_groups_and_schedule_are_those_of_plain_steps(mode):
    model = one_layer()
    optimizer = adamw(model)
    ours, theirs = started(mode), (model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step)))
    for parts in (ours, theirs):
        run(*parts, range(3))
    (_, optimizer, schedule), (_, other, others_schedule) = ours, theirs
    assert schedule.get_last_lr() == others_schedule.get_last_lr()
    assert optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    states, others = optimizer.state_dict()["state"], other.state_dict()["state"]
    torch.testing.assert_close(states, others, rtol=0, atol=1e-5)
    if same_order(mode):
        assert_same(states, others)


@pytest.mark.parametrize("step", [0, 1, GAP], ids=lambda step: f"step {step}")
@pytest.mark.parametrize(("before", "after"), WINDOW_PAIRS, ids=str)
@pytest.mark.broad
def test_a_window_of_micro_batches_is_finished_in_another_mode(before, after, step):
    """With gradients pending: full, projected, or some of each."""

    def window(parts, ids):
        loss_of(parts[0], ids).backward()

    first, second = batch(step).chunk(2)
    parts = started(before)
    run(*parts, range(step))
    window(parts, first)
    grads = [weight.grad for weight in parts[0].parameters()]
    saved, grads = through_a_file(([part.state_dict() for part in parts], grads))

    resumed = started(after)
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    for weight, grad in zip(resumed[0].parameters(), grads, strict=True):
        weight.grad = grad
    for one in (parts, resumed):  # the first goes on as if nothing had happened
        window(one, second)
        one[1].step()
        one[1].zero_grad()
        run(*one, range(step + 1, step + 3))
    assert distance(resumed[0], parts[0]) <= BAR


@pytest.mark.parametrize("gradients", ["projected", "fused"])
def test_pending_gradients_survive_removal_and_attaching_anew(gradients):
    ends = []
    for interrupts in (True, False):
        model = one_layer()
        optimizer = adamw(model)
        attachment = attach(model, optimizer, gradients)
        walk(model, optimizer, range(2))
        for ids in batch(2).chunk(4):
            loss_of(model, ids).backward()
            if interrupts:
                attachment.remove()
                attachment = attach(model, optimizer, gradients)
        assert any(isinstance(weight.grad, ProjectedGradient) for weight in model.parameters())
        optimizer.step()
        ends.append(model)
    assert distance(*ends) <= (0 if gradients == "projected" else 1e-6)


@pytest.mark.parametrize("gradients", ["projected", "fused"])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-6), (torch.bfloat16, 2e-2)])
def test_a_model_is_cast_while_gradients_wait(gradients, dtype, bar):
    ends = []
    for mode in (gradients, "full"):
        model = one_layer()
        optimizer = adamw(model)
        attach(model, optimizer, mode)
        walk(model, optimizer, range(2))
        first, second = batch(2).chunk(2)
        loss_of(model, first).backward()
        model.to(dtype)
        waiting = [weight.grad for weight in model.parameters() if isinstance(weight.grad, ProjectedGradient)]
        assert {held.dtype for grad in waiting for held in (grad, grad.projected, *grad.basis.values())} <= {dtype}
        assert (mode == "full") == (not waiting)
        loss_of(model, second).backward()
        optimizer.step()
        optimizer.zero_grad()
        walk(model, optimizer, [3])
        ends.append(model)
    assert distance(*ends) <= bar


@pytest.mark.parametrize("gradients", ["projected", "fused"])
def test_gradients_that_wait_in_other_bases_are_told_when_a_checkpoint_is_loaded(gradients):
    model = one_layer()
    optimizer = adamw(model)
    attach(model, optimizer, gradients)
    walk(model, optimizer, range(2))
    saved = through_a_file(optimizer.state_dict())
    loss_of(model, batch(2)).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)  # the bases are the same
    optimizer.step()
    optimizer.zero_grad()
    walk(model, optimizer, range(3, GAP + 3))
    loss_of(model, batch(GAP + 3)).backward()
    with pytest.warns(UserWarning, match=r"gradients of \d+ weights \(.*_proj\.weight first\) wait .* zero_grad\(\)"):
        optimizer.load_state_dict(saved)
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
