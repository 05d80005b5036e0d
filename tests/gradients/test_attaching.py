"""A model is attached once, and detached with and without the handle."""

from __future__ import annotations

import functools
from copy import deepcopy

from torch import nn

from galore_torch.gradients import attach, detach
from tests.gradients.llama import adamw, attached, llama, walk
from tests.gradients.untouched import assert_untouched
from tests.modes import every_mode
from tests.optim.small import refusing

one_layer = functools.partial(llama, num_hidden_layers=1)


@every_mode
def test_attaching_twice(mode):
    model, optimizer, attachment = attached(mode, one_layer)
    for again in (model, model.model, nn.ModuleList([model])):
        message = refusing(lambda again=again: attach(again, optimizer, *mode))
        assert "attached already" in message
        assert "remove()" in message
    walk(model, optimizer, range(2))
    attachment.remove()
    assert_untouched(model)
    attach(model, optimizer, *mode)


@every_mode
def test_a_model_is_detached_without_a_handle(mode):
    model, optimizer = attached(mode, one_layer)[:2]
    copy = deepcopy(model)
    detach(copy)  # it is not attached
    assert "attached already" in refusing(lambda: attach(model, optimizer, *mode))
    walk(model, optimizer, range(2))
    detach(model.model)  # a part of what is attached
    assert_untouched(model)
    attach(model, adamw(model), *mode)
    detach(model)
    detach(model)
    assert_untouched(model)
