"""Every way to form and to apply gradients that `attach` offers, by name. Imports no library that is slow to import."""

import pytest

MODES = {
    "full, at step": ("full", "step"),
    "projected, at step": ("projected", "step"),
    "fused, at step": ("fused", "step"),
    "full, in backward": ("full", "backward"),
    "fused, in backward": ("fused", "backward"),
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
