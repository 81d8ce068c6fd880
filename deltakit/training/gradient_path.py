"""Which way to the gradient of a weight matrix's entries is the cheapest."""

from __future__ import annotations

from typing import Literal

GradientPath = Literal["sampled", "submatrix", "dense"]

# Costs per token, in multiply-adds of the dense float32 product on one core (measured with 1,024
# tokens and up to 4096 x 4096 weights; the fixed ones are shared out among those tokens).
ENTRY = 10  # of a sampled product: it pays below 10 % density
ENTRY_16_BIT = 37  # dense products are faster in 16 bits, sampled ones are not: below 2.7 %
TRANSPOSE = 64  # of one feature
SELECT = 32  # of one feature
CALLS = 5_000  # of leaving torch's own layers
PAIR = 300  # of one entry in the row of an embedding that a token looks up


def product_path(
    shape: tuple[int, int], nnz: int, rows: int, columns: int, *, bits: int
) -> GradientPath:
    """For a linear layer's weight whose `nnz` entries occupy so many rows and columns.

    bits: of the weight's dtype.
    """
    features = shape[0] + shape[1]
    entry = ENTRY_16_BIT if bits == 16 else ENTRY
    selected = SELECT * (rows * (rows < shape[0]) + columns * (columns < shape[1]))
    costs: dict[GradientPath, int] = {
        "dense": shape[0] * shape[1],
        "submatrix": CALLS + rows * columns + selected,
        "sampled": CALLS + entry * nnz + TRANSPOSE * features,
    }
    return min(costs, key=lambda path: costs[path])


def embedding_path(shape: tuple[int, int], nnz: int) -> GradientPath:
    """For an embedding's weight: the dense gradient is filled with zeros and added to."""
    dense = shape[0] * shape[1] // 100 + 10 * shape[1]
    return "sampled" if CALLS + PAIR * nnz // shape[0] < dense else "dense"
