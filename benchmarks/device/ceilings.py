"""What the machine can do at most: how fast it copies memory, and how fast it multiplies."""

import sys

import torch

from benchmarks.common.measuring import timed
from benchmarks.device.session import Figures, Session


def measure(session: Session) -> None:
    """Report what runs, the copy in TB/s (bytes read and written) and matrix products in TFLOP/s."""
    device = session.device
    about: Figures = {"device": "CPU", "torch": torch.__version__, "python": sys.version.split()[0]}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        about |= {"device": card.name, "multiprocessors": card.multi_processor_count}
        about |= {"memory GiB": round(card.total_memory / 2**30, 1)}
    session.report("machine", about)
    elements, side = (2**16, 64) if session.small else (2**30, 8192)
    source = torch.zeros(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    ms = timed(lambda: target.copy_(source), device, times=10)["device_ms"]
    session.report("copy", {"TB/s": 2 * source.nbytes / ms / 1e9})
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.randn(side, side, device=device).to(dtype)
        ms = timed(lambda matrix=matrix: matrix @ matrix, device, times=10)["device_ms"]  # type: ignore[misc]
        session.report(f"product {side} {str(dtype)[6:]}", {"TFLOP/s": 2 * side**3 / ms / 1e9})
