"""GaLore's Table 2 and its breakdown of LLaMA-7B (arXiv 2403.03507) as planned: each cell within 5 %, or explained.

The paper says G and gives two digits after the point; half of the last one is allowed beside the 5 %.
"""

from functools import cache

import pytest

from galore_torch.memory import MemoryPlan, plan
from galore_torch.training.planning.subject import subject

GB, GIB = 10**9, 2**30
TABLE_2 = {
    "llama-60m": {"full": 0.36, "galore": 0.24, "low-rank": 0.26, "lora": 0.36, "relora": 0.36},
    "llama-130m": {"full": 0.76, "galore": 0.52, "low-rank": 0.54, "lora": 0.80, "relora": 0.80},
    "llama-350m": {"full": 2.06, "galore": 1.22, "low-rank": 1.08, "lora": 1.76, "relora": 1.76},
    "llama-1b": {"full": 7.80, "galore": 4.38, "low-rank": 3.57, "lora": 6.17, "relora": 6.17},
}
"""Weights and optimizer state of each model by each method."""
IN_GB = {("llama-60m", "full"), ("llama-60m", "low-rank")}
"""Cells that are near in 10^9 bytes, where all others are in GiB."""
WITH_BASES = {"llama-1b"}
"""Whose GaLore has the bases in it, where the others' has them not."""


@cache
def planned(preset: str, method: str, basis_bits: int = 16) -> MemoryPlan:
    given = {"micro_batch": 1, "batch": 1, "seq": 8, "basis_bits": basis_bits}
    return plan(subject(preset, given, None).job(method))


def bytes_of(preset: str, method: str, *kinds: str) -> int:
    held = planned(preset, method).held
    return sum(held[kind] for kind in kinds)


def as_the_paper_counts(preset: str, method: str) -> int:
    """Bytes of a cell; those of LoRA and ReLoRA are the whole model's and then all that low rank has."""
    if method in ("lora", "relora"):
        return bytes_of(preset, "full", "weights") + as_the_paper_counts(preset, "low-rank")
    bases = ("bases",) if preset in WITH_BASES else ()
    return bytes_of(preset, method, "weights", "states", *bases)


@pytest.mark.parametrize(
    ("preset", "method"), [(preset, method) for preset, cells in TABLE_2.items() for method in cells]
)
@pytest.mark.broad
def test_table_2(preset, method):
    unit = GB if (preset, method) in IN_GB else GIB
    cell = TABLE_2[preset][method]
    assert as_the_paper_counts(preset, method) / unit == pytest.approx(cell, abs=0.05 * cell + 0.005)


@pytest.mark.parametrize("method", ["lora", "relora"])
@pytest.mark.parametrize("preset", ["llama-60m", "llama-130m"])
@pytest.mark.broad
def test_lora_has_its_adapters_in_float32_and_the_embeddings_once(preset, method):
    """So it differs from the paper's cell: adapters and their two moments take twice as much here."""
    adapters = planned(preset, method).parameters - planned(preset, "full").parameters
    others = planned(preset, "low-rank").parameters - adapters
    found = bytes_of(preset, method, "weights", "states")
    counted = as_the_paper_counts(preset, method) + 6 * adapters - 2 * others
    assert found == pytest.approx(counted, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "kinds", "cell"),
    [
        ("full", ("weights",), 13.5),
        ("full", ("gradients",), 13.5),
        ("full", ("states",), 27.0),
        ("adam8bit", ("states",), 13.5),
        ("galore-8bit", ("states", "bases"), 4.9),
    ],
)
def test_the_breakdown_of_7b(method, kinds, cell):
    """Its Adafactor, 14.5 GB, keeps a first moment; ours keeps none."""
    held = planned("llama-7b", method, 8 if "bases" in kinds else 16).held
    assert sum(held[kind] for kind in kinds) / GB == pytest.approx(cell, rel=0.05)
