"""Whether a model is as it was before `attach`."""

from torch import nn


def assert_untouched(model: nn.Module) -> None:
    assert all("forward" not in vars(module) for module in model.modules())
    assert not any(weight._post_accumulate_grad_hooks or weight._backward_hooks for weight in model.parameters())
