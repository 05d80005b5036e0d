"""The weights that GaLore projects in the paper's LLaMA models (arXiv 2403.03507) and what their state must weigh."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LlamaShapes:
    """The attention and MLP matrices of one LLaMA and the rank that the paper gives them.

    Attributes:
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        layers: Number of transformer blocks.
        rank: Rank of the projection.
    """

    hidden: int
    intermediate: int
    layers: int
    rank: int

    @property
    def weights(self) -> list[tuple[int, int]]:
        """The shapes (m, n), layer by layer: q, k, v, o, gate, up, down.

        >>> len(LLAMA["350m"].weights)
        168
        """
        attention = [(self.hidden, self.hidden)] * 4
        mlp = [(self.intermediate, self.hidden)] * 2 + [(self.hidden, self.intermediate)]
        return (attention + mlp) * self.layers

    @property
    def coordinates(self) -> list[tuple[int, int]]:
        """The shapes of the weights' coordinates under `proj_type="std"`: m x r for m >= n, else r x n."""
        return [(m, self.rank) if m >= n else (self.rank, n) for m, n in self.weights]

    def state_elements(self) -> int:
        """Elements that GaLore with Adam must keep: each basis (r x min(m, n)) and two moments (r x max(m, n) each).

        >>> LLAMA["60m"].state_elements() * 2  # bytes in bfloat16
        32636928
        """
        return sum(self.rank * min(m, n) + 2 * self.rank * max(m, n) for m, n in self.weights)


LLAMA = {
    "60m": LlamaShapes(hidden=512, intermediate=1376, layers=8, rank=128),
    "350m": LlamaShapes(hidden=1024, intermediate=2736, layers=24, rank=256),
}
