"""The names of target presets, which help and shells know without NumPy and torch."""

from __future__ import annotations

TARGET_PRESETS = {
    "attention-qv": "weights of query and value projections",
    "attention-qkv": "weights of query, key and value projections",
    "attention": "weights of all attention projections, the output included",
    "mlp": "weights of the blocks' other linear layers",
    "all-linear": "weights of all linear layers but the heads of tasks",
    "bias": "bias vectors, those of norms aside",
    "norm": "weights and biases of norms",
    "embeddings": "embedding tables, positions and patches included",
}
