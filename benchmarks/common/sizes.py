"""The LLaMA models that are stepped and trained: their sizes stand here, and nowhere else in the benchmarks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Llama:
    """A LLaMA, and how the paper (arXiv 2403.03507) projects its attention and MLP matrices."""

    hidden: int  # width of the residual stream
    intermediate: int  # width of the MLP
    layers: int  # number of transformer blocks
    heads: int  # number of attention heads
    rank: int  # rank of the projection
    gap: int = 200  # steps between renewals
    vocabulary: int = 32_000  # number of tokens there are
    sequence: int = 256  # length of a sequence

    @property
    def weights(self) -> list[tuple[int, int]]:
        """The shapes (m, n) that are projected, layer by layer: q, k, v, o, gate, up, down.

        >>> len(LLAMA["350m"].weights)
        168
        """
        attention = [(self.hidden, self.hidden)] * 4
        mlp = [(self.intermediate, self.hidden)] * 2 + [(self.hidden, self.intermediate)]
        return (attention + mlp) * self.layers

    @property
    def basis_elements(self) -> int:
        """Numbers in all bases: r x min(m, n) each."""
        return sum(self.rank * min(shape) for shape in self.weights)

    @property
    def other_elements(self) -> int:
        """Numbers in what is not projected: embeddings, head and norms."""
        return 2 * self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden

    def state_elements(self) -> int:
        """Numbers that GaLore with Adam must keep: each basis and two moments (r x max(m, n) each).

        >>> LLAMA["60m"].state_elements() * 2  # bytes in bfloat16
        32636928
        """
        return self.basis_elements + 2 * sum(self.rank * max(shape) for shape in self.weights)

    def architecture(self) -> "LlamaConfig":
        """Return Transformers' configuration."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=max(2048, self.sequence),
            use_cache=False,
        )

    def model(self, dtype: torch.dtype, device: str = "cpu") -> "LlamaForCausalLM":
        """Build the model with random weights, in their dtype from the start and where they are to be."""
        from transformers import LlamaForCausalLM

        before = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return LlamaForCausalLM(self.architecture())
        finally:
            torch.set_default_dtype(before)


LLAMA = {
    "tiny": Llama(256, 688, 4, 4, 64, gap=50, vocabulary=2048, sequence=128),
    "60m": Llama(512, 1376, 8, 8, 128),
    "130m": Llama(768, 2048, 12, 12, 256),
    "350m": Llama(1024, 2736, 24, 16, 256),
    "1b": Llama(2048, 5461, 24, 32, 512),
    "7b": Llama(4096, 11008, 32, 32, 1024, gap=500),
}
"""The presets of `galore pretrain`, without the part of their names that is the same."""

REHEARSAL = Llama(32, 80, 1, 4, 8, vocabulary=64, sequence=16)
"""Next to nothing: what libraries set up at their first use is set up with it."""
