"""docs/optimizers.md says of every optimizer what becomes of it inside: each table is made anew and compared."""

import pytest

from tests.optim.served_optimizers import LIBRARIES, PAGE, section

QUICK = ("optimi", "prodigyopt", "schedulefree")


@pytest.mark.of_cpu("the page is of the versions of constraints.txt, on a CPU")
@pytest.mark.parametrize(
    "library", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in LIBRARIES]
)
def test_the_table_is_what_the_optimizers_do(library):
    """`python -m tests.optim.served_optimizers` writes the page; that all are equal to the bit is asserted there."""
    assert section(library) in PAGE.read_text()
