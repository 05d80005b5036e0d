"""What holds for every test: no network, no screen, one thread and the same random numbers."""

import os

# Read when torch, Transformers and matplotlib are first imported, so they are set before any of them is.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give each test the same random numbers, whichever tests ran before it and in whichever process."""
    torch.manual_seed(0)
