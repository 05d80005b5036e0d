from collections.abc import Iterator

import pytest

from benchmarks.common.bf16_products import as_torch_does


@pytest.fixture(autouse=True)
def torchs_products_afterwards() -> Iterator[None]:
    """A benchmark replaces kernels of the process where it lacks instructions; other tests count on torch's."""
    yield
    as_torch_does()
