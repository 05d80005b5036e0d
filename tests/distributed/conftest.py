from collections.abc import Iterator

import pytest
import torch

from tests.distributed.pool import Pool
from tests.forked import TRAINING


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    made = Pool()
    yield made
    made.close()


@pytest.fixture(scope="session")
def training_pool() -> Iterator[Pool]:
    """Two processes that have Transformers."""
    made = Pool(2, TRAINING)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def as_many_threads() -> Iterator[None]:
    """What several processes of one thread each are compared with has one, too: products are cut up by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
