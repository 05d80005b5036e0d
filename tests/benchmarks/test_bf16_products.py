import subprocess
import sys
import textwrap

import pytest
import torch

from benchmarks.common import bf16_products as products
from galore_torch import devices

CHECK = """
    import torch
    from benchmarks.common import bf16_products as products

    products._install()  # also where the CPU multiplies bfloat16 itself
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    def close(ours, exact):
        assert ours.dtype == torch.bfloat16
        assert torch.allclose(ours.double(), exact, rtol=2**-8, atol=1e-3), (ours.double() - exact).abs().max()

    products.BLOCK_ELEMENTS = 2048  # several blocks, and a short last one
    a, b, c = draw(70, 50).bfloat16(), draw(50, 90).bfloat16(), draw(70, 90).bfloat16()
    wide_a, wide_b, wide_c = a.double(), b.double(), c.double()
    close(a @ b, wide_a @ wide_b)
    close(torch.nn.functional.linear(a, b.T.contiguous()), wide_a @ wide_b)
    close(torch.addmm(c, a, b, beta=0.5, alpha=2), 0.5 * wide_c + 2 * wide_a @ wide_b)
    close(c.clone().addmm_(a, b, beta=0.9, alpha=-0.1), 0.9 * wide_c - 0.1 * wide_a @ wide_b)
    close(torch.stack((a, -a)) @ torch.stack((b, b)), torch.stack((wide_a @ wide_b, -wide_a @ wide_b)))
    x = draw(8, 50).bfloat16().requires_grad_()
    layer = torch.nn.Linear(50, 30).bfloat16()
    layer(x).backward(torch.ones(8, 30, dtype=torch.bfloat16))
    close(layer.weight.grad, torch.ones(30, 8).double() @ x.detach().double())
    assert torch.equal(wide_a @ wide_b, torch.mm(wide_a, wide_b, out=torch.empty(70, 90).double()))
"""


@pytest.mark.slow
def test_products_of_bfloat16_matrices_are_those_of_float32_rounded_once():
    subprocess.run([sys.executable, "-c", textwrap.dedent(CHECK)], check=True, timeout=120)


def test_kernels_are_replaced_only_where_the_processor_lacks_bfloat16(monkeypatch):
    monkeypatch.setattr(devices, "cpu_multiplies_bfloat16", lambda: True)
    assert not products.in_float32()


def test_torchs_kernels_are_back_afterwards(monkeypatch):
    a = torch.randn(70, 50).bfloat16()
    calls = []
    monkeypatch.setattr(devices, "cpu_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(products, "_addmm_in_place", lambda into, *_, **__: calls.append(1) or into.zero_())
    assert products.in_float32()
    assert not (a @ a.T).any()
    products.as_torch_does()
    assert (a @ a.T).any()
    assert len(calls) == 1
