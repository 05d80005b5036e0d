"""galore-torch: train every weight of a large model, with low-rank optimizer state for its matrices.

GaLore (Gradient Low-Rank Projection, arXiv 2403.03507) around any torch optimizer:

    from galore_torch import GaLoreAdamW, param_groups

    optimizer = GaLoreAdamW(param_groups(model, rank=128), lr=1e-2)
"""

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from galore_torch.gradients import attach, detach
    from galore_torch.lowbit import dequantize_weights, quantize_weights
    from galore_torch.optim import (
        GaLore,
        GaLoreAdafactor,
        GaLoreAdamW,
        GaLoreAdamW8bit,
        GaLoreMuon,
        GaLoreSGD,
        ProjectedGradient,
        QGaLoreAdamW8bit,
        lower_ranks,
    )
    from galore_torch.targets import choose_ranks, param_groups

__version__ = "2.0.0rc1"

__all__ = [
    "GaLore",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreMuon",
    "GaLoreSGD",
    "ProjectedGradient",
    "QGaLoreAdamW8bit",
    "attach",
    "choose_ranks",
    "dequantize_weights",
    "detach",
    "lower_ranks",
    "param_groups",
    "quantize_weights",
]

_PACKAGES = ("gradients", "lowbit", "optim", "projection", "targets")
_WITH_TORCH = {*_PACKAGES, "distributed", "galore_projector", "integrations", "memory", "messages", "modules"}
_HOMES = {
    "attach": "gradients",
    "choose_ranks": "targets",
    "dequantize_weights": "lowbit",
    "detach": "gradients",
    "param_groups": "targets",
    "quantize_weights": "lowbit",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: the command line answers, and hears Ctrl-C, before torch is there."""
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "optim")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    return value


def _make_known() -> None:
    """Registers our tensors with `torch.load(weights_only=True)`, and `distributed/` with `attach`.

    Importing what defines them does.
    """
    importlib.import_module(f"{__name__}.optim")
    importlib.import_module(f"{__name__}.distributed")


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Does so when torch is imported after us; once, and without any part in how torch is found.

    A package of ours that needs torch has it imported first, before the package itself is half imported. And many only
    look whether torch is there, before they import it: that is not yet an import.
    """

    _looks = False

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        del path, target
        if name.startswith(f"{__name__}.") and name.split(".")[1] in _WITH_TORCH:
            importlib.import_module("torch")
            return None
        if name != "torch" or self._looks:
            return None
        self._looks = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looks = False
        if spec is not None and spec.loader is not None:
            loader = spec.loader
            run = loader.exec_module

            def run_and_tell(module: Any) -> None:
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                run(module)
                _make_known()

            loader.exec_module = run_and_tell  # type: ignore[method-assign]
        return spec


if "torch" in sys.modules:
    _make_known()
else:
    sys.meta_path.insert(0, _AfterTorch())


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
