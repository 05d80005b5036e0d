"""What a training process of the throughput and memory benchmarks is asked to be."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from benchmarks.shapes import LlamaShapes

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True, kw_only=True)
class Training:
    """Whole training steps of a LLaMA on random tokens.

    Attributes:
        method: Key of `METHODS`.
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        layers: Number of transformer blocks.
        heads: Number of attention heads.
        vocabulary: Number of tokens there are.
        sequence: Length of a sequence.
        tokens: Tokens in a step.
        batch: Sequences at once; gradients accumulate until the step has its tokens.
        rank: Rank of the projection.
        gap: Steps between renewals.
        stagger: Whether our layers take turns to renew.
        dtype: Name of the torch dtype of the weights.
        device: Where it runs: cpu or cuda.
        threads: Threads of torch.
    """

    method: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    sequence: int
    tokens: int
    batch: int
    rank: int
    gap: int
    stagger: bool
    dtype: str
    device: str
    threads: int

    def __post_init__(self) -> None:
        if self.tokens % (self.batch * self.sequence):
            raise ValueError(
                f"tokens is {self.tokens}, which is not a multiple of {self.batch} sequences of {self.sequence}; "
                "choose another number of tokens or another batch"
            )

    @property
    def micro_batches(self) -> int:
        """How many backward passes a step takes."""
        return self.tokens // (self.batch * self.sequence)

    @property
    def shapes(self) -> LlamaShapes:
        """The weights that are projected."""
        return LlamaShapes(hidden=self.hidden, intermediate=self.intermediate, layers=self.layers, rank=self.rank)

    def tiny(self) -> "Training":
        """Return the same method on next to nothing, for a rehearsal."""
        sizes = replace(self, hidden=32, intermediate=64, layers=1, heads=2, vocabulary=64)
        return replace(sizes, rank=8, sequence=16, tokens=16, batch=1)

    def model(self) -> "LlamaForCausalLM":
        """Build the model with random weights, in its dtype from the start and where it runs."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=max(1024, self.sequence),
            use_cache=False,
        )
        before = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(getattr(torch, self.dtype))
        try:
            with torch.device(self.device):
                return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
