"""A small LLaMA in float64 on a part of each batch, in one process or several: what these tests compare."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from galore_torch import (
    GaLore,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreSGD,
    QGaLoreAdamW8bit,
    attach,
    param_groups,
    quantize_weights,
)

STEPS, GAP, RANK = 30, 4, 4
ROWS, TOKENS, VOCABULARY = 8, 6, 37
BAR = 1e-12
RECIPES: dict[str, Callable[..., Any]] = {
    "adamw": GaLoreAdamW,
    "sgd": GaLoreSGD,
    "adafactor": GaLoreAdafactor,
    "adamw8bit": GaLoreAdamW8bit,
    "qgalore": QGaLoreAdamW8bit,
    "muon": functools.partial(GaLore, optimizer_class=torch.optim.Muon, fallback_class=torch.optim.AdamW),
    "torch's adafactor": functools.partial(GaLore, optimizer_class=torch.optim.Adafactor),
    "stochastic": functools.partial(GaLore, rounding="stochastic"),
    "compensated": functools.partial(GaLore, rounding="compensated"),
}


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Layer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = Norm(width), Norm(width)
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width, bias=False) for name in "qkvo"})
        shapes = {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})

    def forward(self, x: Tensor) -> Tensor:
        h, at = self.before(x), self.self_attn
        q, k, v = (at[f"{name}_proj"](h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv")
        x = x + at["o_proj"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.after(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h))


class Llama(nn.Module):
    """A few layers. A batch says which of them it skips, if it does; they may be run again in the backward pass."""

    def __init__(
        self, width: int = 24, inner: int = 40, heads: int = 3, *, layers: int = 2, tied: bool = False
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList([Layer(width, inner, heads) for _ in range(layers)])
        self.norm = Norm(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.layers[1].mlp["up_proj"].weight = self.layers[0].mlp["up_proj"].weight
        self.skips = self.checkpoints = False

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for number, layer in enumerate(self.layers):
            if not (number == 1 and self.skips):
                x = checkpoint(layer, x, use_reentrant=False) if self.checkpoints else layer(x)
        return self.lm_head(self.norm(x))


def llama(seed: int = 0, dtype: torch.dtype = torch.float64, **shape: Any) -> Llama:
    torch.manual_seed(seed)
    return Llama(**shape).to(dtype)


def batch(step: int, micro: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * micro + step)
    return torch.randint(0, VOCABULARY, (ROWS, TOKENS + 1), generator=generator)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def optimizer_of(
    model: nn.Module, recipe: str = "adamw", seed: int = 0, skip_nonfinite: bool = False, **keys: Any
) -> Any:
    groups = param_groups(model, **{"rank": RANK, "update_proj_gap": GAP, **keys})
    given: dict[str, Any] = {} if recipe == "adafactor" else {"lr": 1e-2}
    return RECIPES[recipe](groups, seed=seed, skip_nonfinite=skip_nonfinite, **given)


def weights_of(model: nn.Module) -> Tensor:
    """All parameters in one vector; of sharded ones whole."""
    whole = [one.full_tensor() if hasattr(one, "full_tensor") else one for one in model.parameters()]
    return torch.cat([one.detach().flatten().double() for one in whole])


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2."""
    return float((ours - theirs).norm() / theirs.norm())


def trained(
    rank: int,
    world: int,
    *,
    mode: tuple[str, str] | None,
    recipe: str = "adamw",
    steps: int = STEPS,
    micro: int = 1,
    no_sync: bool = True,
    clip: float | None = None,
    to_none: bool = True,
    ddp: dict[str, Any] | None = None,
    seed_of_model: int = 0,
    skips: Callable[[int, int], bool] | None = None,
    shape: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    int8: bool = False,
    attachment: dict[str, Any] | None = None,
    parts: int = 2,
    reverses: bool = False,
    alike: bool = False,
    **keys: Any,
) -> Tensor:
    """The weights after some steps: of one process on whole batches, or of one of several under DDP on its part.

    With `reverses` the rows of a batch come the other way round: the same sums, in another order. With `skips` a batch
    is taken in as many parts as there are processes, also in one, for it says of each. With
    `alike` each process has the whole batch.
    """
    model = llama(seed_of_model, dtype, **(shape or {}))
    if int8:
        quantize_weights(model, "all-linear")
    optimizer = optimizer_of(model, recipe, **keys)
    if mode is not None:
        attach(model, optimizer, *mode, **(attachment or {}))  # type: ignore[arg-type]
    net = DistributedDataParallel(model, **(ddp or {})) if world > 1 else model
    for step in range(steps):
        for number in range(micro):
            last = number == micro - 1
            context = nullcontext() if world == 1 or last or not no_sync else net.no_sync()
            with context:
                ids = batch(step, number).flip(0) if reverses else batch(step, number)
                if skips is None:
                    loss = loss_of(net, ids if alike else ids.tensor_split(world)[rank])
                elif world > 1:
                    model.skips = skips(step, rank)
                    loss = loss_of(net, ids.tensor_split(world)[rank])
                else:
                    loss = torch.zeros(())
                    for part, mine in enumerate(ids.tensor_split(parts)):
                        model.skips = skips(step, part)
                        loss = loss + loss_of(net, mine) / parts
                (loss / micro).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
    return weights_of(model)
