"""What is computed in another way on each device is the same on all."""

import pytest
import torch

from galore_torch.devices import largest_entry

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("special", [0.5, -7.0, INF, -INF, NAN])
@pytest.mark.parametrize("dim", [(), (-1,), (-2, -1)])
def test_the_largest_entry_is_the_infinity_norm(
    dtype: torch.dtype, special: float, dim: tuple[int, ...], device: str
) -> None:
    numbers = torch.randn(3, 4, 5, dtype=dtype, device=device)
    numbers[1, 2, 3] = special
    for keepdim in (False, True):
        expected = torch.linalg.vector_norm(numbers, INF, dim=dim or None, keepdim=keepdim)
        found = largest_entry(numbers, dim, keepdim=keepdim)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
