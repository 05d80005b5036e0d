"""The keys of a projected group: declared without torch, in agreement with what serves them."""

import subprocess
import sys
from typing import get_type_hints

import pytest

from galore_torch import param_groups
from galore_torch.group_keys import KEYS, PROJECTED_DEFAULTS
from galore_torch.lowbit import BITS
from galore_torch.modes import GRAD_BITS, GRADIENTS, UPDATES
from galore_torch.projection import DECOMPOSITIONS
from galore_torch.training.settings.fields import choices_of
from galore_torch.training.settings.optimizer import OptimizerConfig


def test_choices_are_those_that_are_served():
    assert set(KEYS["decomposition"].choices) == set(DECOMPOSITIONS)
    assert KEYS["basis_bits"].choices == (16, *BITS)
    hints = get_type_hints(OptimizerConfig)
    for name, choices in {"gradients": GRADIENTS, "update": UPDATES, "grad_bits": GRAD_BITS}.items():
        assert choices_of(hints[name]) == choices


@pytest.mark.parametrize("name", KEYS)
def test_every_key_is_a_setting_with_its_choices_and_its_default(name):
    served = () if name == "stagger" else KEYS[name].choices
    served += ("none",) if name == "residual" else ()  # None as a flag says it, against a recipe's own
    assert choices_of(get_type_hints(OptimizerConfig)[name]) == served
    if name != "rank":
        assert getattr(OptimizerConfig(), name) == PROJECTED_DEFAULTS[name]


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("value", ["nonsense", -1, 0, 1, 1.5, True, 3, 4, 16, float("nan"), None])
@pytest.mark.broad
def test_settings_and_groups_accept_the_same_values(name, value):
    if name == "rank" and value is None:
        return
    try:
        OptimizerConfig(**{name: value})
    except ValueError:
        assert not KEYS[name].accepts(value), value
    else:
        assert KEYS[name].accepts(value), value


def test_the_declaration_imports_no_torch():
    code = "import sys, galore_torch.group_keys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_wrong_name_is_refused_with_the_right_one():
    import torch

    with pytest.raises(ValueError, match=r"update_gap=5 .*did you mean update_proj_gap"):
        param_groups(torch.nn.Sequential(torch.nn.Linear(8, 8)), 4, "all-linear", update_gap=5)
