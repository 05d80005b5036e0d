"""Models of the study: each trained from a seed on text, and judged on text that was held out; several take turns."""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.sizes import LLAMA, REHEARSAL, Llama
from benchmarks.study.methods import METHODS
from galore_torch.optim import state_bytes

WARMUP, FLOOR = 0.1, 0.1
"""Share of the steps in which rates rise, and what they fall to by a cosine, as `galore pretrain` has it."""

SIZE = LLAMA["tiny"]
"""What is trained: 4.2M parameters, the preset of `galore pretrain`."""

POINTS = 40  # of a curve
SEQUENCES_JUDGED = 64  # at once


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training."""

    method: str  # one of METHODS
    lr: float  # peak rate of the layers' matrices
    others_lr: float  # peak rate of embeddings, head and norms
    seed: int = 0  # of the model's first weights and of the order of the text
    steps: int = 400
    tokens: int = 2048  # in a step


@dataclass(frozen=True, kw_only=True)
class Text:
    """Packed sequences: (number, length) of int16."""

    train: Tensor
    held_out: Tensor


def prepare(path: Path) -> None:
    """Read, tokenize and pack the sources of the standard library, as `galore pretrain` does, and write them."""
    from rich.console import Console

    from galore_torch.training.text.config import DataConfig
    from galore_torch.training.text.packing import prepare_text

    config = DataConfig(tokenizer="train", vocab=SIZE.vocabulary, seq=SIZE.sequence, eval_tokens=65_536)
    text: Any = prepare_text(config, Console(stderr=True), batch=16, seed=0)
    train, held_out = (
        torch.tensor(part.with_format("numpy")[:]["input_ids"], dtype=torch.int16)
        for part in (text.train, text.held_out)
    )
    torch.save({"train": train, "held_out": held_out}, path)  # a `Text`


def rehearsal(device: str) -> tuple[Text, Llama]:
    """Return random text, and the size of a model of next to nothing."""
    drawn = torch.randint(REHEARSAL.vocabulary, (64, REHEARSAL.sequence), dtype=torch.int16, device=device)
    return Text(train=drawn, held_out=drawn), REHEARSAL


class Model:
    """A LLaMA that can start anew from a seed; on a GPU its passes are recorded once and played back.

    Args:
        size: of the model.
        sequences: in a step.
        device: where it is.
    """

    def __init__(self, size: Llama, sequences: int, device: str) -> None:
        self.size = size
        self.net = self._drawn(0).to(device)
        self.ids = torch.zeros(sequences, size.sequence, dtype=torch.long, device=device)
        # A ready mask, for without one Transformers asks the device whether sequences are packed.
        self.mask = torch.ones(1, 1, size.sequence, size.sequence, dtype=torch.bool, device=device).tril()
        self.passes: Callable[[], Tensor] = self._passes
        if device == "cuda":
            try:
                self._record()
            except RuntimeError as error:  # then they are launched each time
                print(f"passes cannot be recorded: {error}", flush=True)
        self._gradients = [weight.grad for weight in self.net.parameters()]

    def _drawn(self, seed: int) -> nn.Module:
        from transformers import LlamaForCausalLM

        torch.manual_seed(seed)
        net: nn.Module = LlamaForCausalLM(self.size.architecture())
        return net

    def start(self, seed: int) -> None:
        """Begin with the weights that a seed draws."""
        self.net.load_state_dict(self._drawn(seed).state_dict())

    def parts(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the layers' matrices, and the others: embeddings, head and norms."""
        parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for name, weight in self.net.named_parameters():
            parts[".layers." not in name or weight.dim() != 2].append(weight)
        return parts

    def gradients(self, ids: Tensor) -> Tensor:
        """Form the gradients of (sequences, length) tokens and return the loss: a scalar of the device's."""
        self.ids.copy_(ids)
        for weight, gradient in zip(self.net.parameters(), self._gradients, strict=True):
            weight.grad = gradient
        return self.passes()

    def _passes(self) -> Tensor:
        for weight in self.net.parameters():
            weight.grad = None
        loss = self._loss(self.ids)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _loss(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.net(input_ids=ids, labels=ids, attention_mask=self.mask.expand(len(ids), -1, -1, -1)).loss
        return loss

    def _record(self) -> None:
        """Record the passes, for launching their kernels takes longer than they do."""
        # In the place's own stream: torch would record all graphs of a process in one, and cuBLAS has a workspace for
        # each stream, which graphs that run at the same time would then share.
        stream = torch.cuda.current_stream()
        for _ in range(3):  # libraries set up what they need
            self._passes()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            loss = self._passes()

        def replay() -> Tensor:
            graph.replay()
            return loss

        self.passes = replay

    @torch.no_grad()
    def judge(self, sequences: Tensor) -> float:
        """Return the mean loss of the tokens of sequences."""
        parts = [part.long() for part in torch.split(sequences, SEQUENCES_JUDGED)]
        losses = [self._loss(part) * len(part) for part in parts]
        return float(torch.stack(losses).sum()) / len(sequences)


@cache
def model(size: Llama, sequences: int, device: str, place: int) -> Model:  # noqa: ARG001 (a key)
    """Return the model of a process for a size, number of sequences, device and place, which no other training uses."""
    return Model(size, sequences, device)


def rate(step: int, steps: int) -> float:
    """The factor on the peak rate in a step, counted from 0.

    >>> rate(0, 100), rate(9, 100), round(rate(99, 100), 3)
    (0.1, 1.0, 0.1)
    """
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    along = (step + 1 - warm) / max(1, steps - warm)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * along))


def train(job: Job, text: Text, size: Llama, device: str, place: int) -> Iterator[dict[str, Any]]:
    """Train and judge.

    Yields:
        Nothing after each step, so that others can take theirs. At the end `perplexity` of the held-out text, infinite
        if training came apart; `curve`, mean losses of so many equal parts; `seconds`; `state_bytes` of the optimizers
        of the matrices and of the others.
    """
    began_s = time.perf_counter()
    sequences, method = job.tokens // size.sequence, METHODS[job.method]
    here = model(size, sequences, device, place)
    here.start(job.seed)
    matrices, others = here.parts()
    optimizers = [method.matrices(matrices, job.lr, size), method.others(others, job.others_lr, size)]
    generator = torch.Generator().manual_seed(job.seed)
    epochs = math.ceil(job.steps * sequences / len(text.train))
    order = torch.cat([torch.randperm(len(text.train), generator=generator) for _ in range(epochs)]).to(device)
    losses = torch.zeros(job.steps, device=device)
    for step in range(job.steps):
        if step == job.steps // 2:
            for group in optimizers[0].param_groups:
                group.update(method.halfway)
        losses[step] = here.gradients(text.train[order[step * sequences : (step + 1) * sequences]])
        if method.clip:
            nn.utils.clip_grad_norm_([*matrices, *others], method.clip)
        for optimizer, peak in zip(optimizers, (job.lr, job.others_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(step, job.steps)
            optimizer.step()
        yield {}
        if step % max(1, job.steps // 4) == 0 and not math.isfinite(float(losses[step])):
            break
    loss = here.judge(text.held_out)
    yield {
        "perplexity": math.exp(loss) if loss < 20 else math.inf,
        "curve": [round(float(part.mean()), 4) for part in losses.cpu().tensor_split(min(POINTS, job.steps))],
        "seconds": round(time.perf_counter() - began_s, 2),
        "state_bytes": [state_bytes(optimizer) for optimizer in optimizers],
    }


def serve(ends: Sequence[Connection], path: Path | None, device: str) -> None:
    """Train what is asked for, in one process: a job at each end at a time, all in turn, each in its own stream."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # else streams wait for each other in 8 queues
    warnings.filterwarnings("error", message="no effect")  # a key that is not known
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    text, size = (
        rehearsal(device) if path is None else (Text(**torch.load(path, map_location=device, weights_only=True)), SIZE)
    )
    streams = [torch.cuda.Stream() if device == "cuda" else None for _ in ends]  # type: ignore[no-untyped-call]
    running: dict[int, Iterator[dict[str, Any]]] = {}
    while True:
        for ready in wait(ends, timeout=0 if running else None):
            assert isinstance(ready, Connection)
            job: Job = ready.recv()
            job = replace(job, steps=job.steps // 50) if path is None else job
            place = ends.index(ready)
            running[place] = train(job, text, size, device, place)
        for place, training in list(running.items()):
            try:
                with nullcontext() if device == "cpu" else torch.cuda.stream(streams[place]):
                    result = next(training)
            except Exception as error:  # one that fails must not end the others, unless the device is lost
                if "CUDA error" in str(error):
                    raise
                result = {"perplexity": math.inf, "error": f"{type(error).__name__}: {error}"[:300]}
            if result:
                del running[place]
                ends[place].send(result)
