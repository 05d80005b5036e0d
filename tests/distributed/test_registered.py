"""`attach` knows of other processes however torch and galore_torch came to be imported."""

import subprocess
import sys

import pytest

ORDERS = {
    "torch first": "import torch, galore_torch",
    "torch last": "import galore_torch, torch",
    "torch looked for before": "import galore_torch, importlib.util; importlib.util.find_spec('torch'); import torch",
    "by a part of ours": "import galore_torch.gradients",
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.slow  # each imports torch anew
def test_it_is_registered_once_both_are_imported(order):
    asked = f"{order}; from galore_torch.optim.processes import JOIN, SHARD; print(len(JOIN), len(SHARD))"
    assert subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout == "1 1\n"
