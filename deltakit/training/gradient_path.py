"""Which way to the gradient of a weight matrix's entries is the cheapest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GradientPath = Literal["sampled", "submatrix", "dense"]


@dataclass(frozen=True)
class Costs:
    """Costs per token, in multiply-adds of the dense product.

    entry: of one in a sampled product; transpose, select: of one feature; calls: of leaving torch's
    own layers, shared out among the tokens of a step.
    """

    entry: int
    transpose: int
    select: int
    calls: int


# On CPUs: measured on one core with 1,024 tokens and up to 4096 x 4096 weights, in float32. Dense
# products are faster in 16 bits and sampled ones are not: they pay below 10 % and 2.7 % density.
CPU = Costs(entry=10, transpose=64, select=32, calls=5_000)
CPU_16_BIT = Costs(entry=37, transpose=64, select=32, calls=5_000)

# On devices: reckoned, not measured, from the published speeds of an H100. An entry reads two
# numbers of a token from the cache at 5 TB/s, a feature is read and written at 3 TB/s, calls take
# 20 microseconds, a step has 8,192 tokens; the dense product's multiply-add takes 2 / 700e12 s in
# 16 bits and 2 / 50e12 s in 32.
DEVICE = Costs(entry=40, transpose=70, select=70, calls=60_000)
DEVICE_16_BIT = Costs(entry=280, transpose=470, select=470, calls=850_000)

PAIR = 300  # on CPUs, of one entry in the row of an embedding that a token looks up


def product_path(
    shape: tuple[int, int], nnz: int, rows: int, columns: int, *, bits: int, on_cpu: bool = True
) -> GradientPath:
    """For a linear layer's weight whose `nnz` entries occupy so many rows and columns.

    bits: of the weight's dtype.
    """
    if on_cpu:
        costs = CPU_16_BIT if bits == 16 else CPU
    else:
        costs = DEVICE_16_BIT if bits == 16 else DEVICE
    features = shape[0] + shape[1]
    selected = costs.select * (rows * (rows < shape[0]) + columns * (columns < shape[1]))
    ways: dict[GradientPath, int] = {
        "dense": shape[0] * shape[1],
        "submatrix": costs.calls + rows * columns + selected,
        "sampled": costs.calls + costs.entry * nnz + costs.transpose * features,
    }
    return min(ways, key=lambda way: ways[way])


def embedding_path(shape: tuple[int, int], nnz: int) -> GradientPath:
    """For an embedding's weight: the dense gradient is filled with zeros and added to."""
    dense = shape[0] * shape[1] // 100 + 10 * shape[1]
    return "sampled" if CPU.calls + PAIR * nnz // shape[0] < dense else "dense"
