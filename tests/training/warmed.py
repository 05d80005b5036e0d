"""Imported by a server: makes once what each process that it forks would make and keep in its first run.

The command line's modules, Transformers' table of names in checkpoints (a thousand regular expressions), the fonts of a
picture, and the trial of the optimizer with the rates of a preset: nearly half of what a tiny run takes in a process of
its own.
"""

import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from galore_torch.cli import build_app
from galore_torch.training.pretrain.presets import configure
from galore_torch.training.run import optimizers, plots, records


def warm() -> None:
    build_app()
    get_checkpoint_conversion_mapping("llama")  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"
        records.append(metrics, {"step": 1, "tokens": 1, "loss": 1.0, "lr": 1.0, "seconds": 1.0})
        plots.plot_losses("none", metrics, metrics.with_suffix(".png"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # none is to be lost when this process forks
    with torch.random.fork_rng(devices=[]):
        layers = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(8, 8, bias=False)})])})
        optimizers.build(layers, configure("llama-tiny", rank=4).optimizer, seed=0)
    torch.set_num_threads(threads)


warm()
