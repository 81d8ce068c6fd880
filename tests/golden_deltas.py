"""What the golden files hold. They are read for ever: rows are added here, never changed.

    python tests/golden_deltas.py

writes the files of new rows into tests/golden and leaves those that are there alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from adapter_deltas import adapter_delta

from deltakit.delta import BaseIdentity, Fingerprint, SparseDelta, TensorDelta
from deltakit.dtypes import DTYPES, Array
from deltakit.formats.sdelta import save
from deltakit.formats.seeded import seeded_support

FOLDER = Path(__file__).parent / "golden"


def words(count: int, size: int) -> Array:
    """`count` little-endian words of `size` bytes, NaNs and infinities among them."""
    listed = [(0xF1E2D3C4B5A69788 * (i + 1) + 0x7FC0) % 2 ** (8 * size) for i in range(count)]
    return np.array(listed, f"<u{size}")


def add(shape: tuple[int, ...], indices: Any, dtype: str = "float32", **other: Any) -> TensorDelta:
    """A tensor named "w" in add mode, its values exact in every dtype."""
    chosen = np.array(indices, np.int64)
    values = (np.arange(len(chosen)) % 13 - 6) * 0.25
    given = {"name": "w", "mode": "add", "values": values, **other}
    return TensorDelta(shape=shape, dtype=dtype, indices=chosen, **given)


def put(dtype: str, count: int = 3) -> TensorDelta:
    """A tensor named by its dtype in set mode, with base values."""
    raw = words(2 * count, DTYPES[dtype].itemsize)
    if dtype == "bool":
        raw &= np.uint8(1)
    return TensorDelta(
        name=f"layer.{dtype}",
        shape=(4, 5),
        dtype=dtype,
        mode="set",
        indices=np.arange(count) * 7,
        values=raw[:count],
        base_values=raw[count:],
    )


def delta(*tensors: TensorDelta, **other: Any) -> SparseDelta:
    """A delta of `tensors`."""
    return SparseDelta(tensors={tensor.name: tensor for tensor in tensors}, **other)


def extras() -> dict[str, Array]:
    """One extra of every dtype, in several shapes."""
    shapes = [(2, 3), (), (5,), (1, 2, 2), (0, 3)]
    made = {}
    for at, (name, kind) in enumerate(DTYPES.items()):
        shape = shapes[at % len(shapes)]
        raw = words(int(np.prod(shape)), kind.itemsize)
        raw = raw & np.uint8(1) if name == "bool" else raw
        made[f"head.{name}"] = raw.view(kind.numpy).reshape(shape)
    return made


def identity() -> SparseDelta:
    """Everything that describes a delta."""
    prints = {
        "w": Fingerprint(sample="0123456789abcdef", support="fedcba9876543210"),
        "unchanged": Fingerprint(sample="00000000ffffffff"),
    }
    base = BaseIdentity(
        model_id="acme/größe", revision="0" * 40, total_weights=184_000_000, tensors=prints
    )
    provenance = {"method": "id3", "lr": 0.001, "steps": [1, 2**53 + 1], "note": 'a "b" \\ ü\n'}
    config = {"num_labels": 3, "id2label": {"0": "no", "1": "yes"}}
    return delta(add((3, 4), [1, 5]), base=base, config=config, provenance=provenance)


def many() -> SparseDelta:
    """Tensors that differ in everything, their names in bytewise order only after sorting."""
    return delta(
        add((40, 25), [1, 4, 9, 100, 555, 999], name="b", order=[5, 0, 2, 2, 1, 5]),
        add((), [0], "float16", name="B", trained_dtype="bfloat16"),
        add((3, 0, 2), [], "bfloat16", name="é"),
        add((64,), [], name="z"),
        add((9,), [2, 3, 8], "float64", name="a.1", order=[0, 0, 0]),
        put("bfloat16"),
        extras={"head.bias": np.arange(3, dtype=np.float32)},
    )


def golden() -> dict[str, tuple[SparseDelta, dict[str, Any]]]:
    """File name without suffix -> the delta in it, and how it was saved."""
    spread = [i * i for i in range(31)]
    ordered = add((1000,), spread, order=[i * 37 % 1000 for i in range(31)])
    seeded = [(name, seeded_support(7, name, 200, n)) for name, n in [("a", 40), ("b", 190)]]
    example = add((100,), [3, 17, 18, 90], values=[1.0, -2.0, 0.5, 0.25], order=[0, 1, 1, 2])
    return {
        "v1-example": (delta(example), {}),  # shown byte by byte in formats/SPEC.md
        "v1-rice": (delta(add((1000,), spread)), {}),
        "v1-bitmap": (delta(add((20,), [0, 2, 3, 5, 8, 9, 12, 13, 15, 18, 19])), {}),
        "v1-dense": (delta(add((2, 3), range(6))), {}),
        "v1-rows": (delta(add((50, 4), [*range(12, 16), *range(80, 88)])), {}),
        "v1-columns": (delta(add((5, 60), [r * 60 + c for r in range(5) for c in (3, 41)])), {}),
        "v1-runs": (delta(add((5000,), [*range(7, 90), *range(4000, 4100), 4999])), {}),
        "v1-seeded": (
            delta(*(add((10, 20), indices, name=name, seed=7) for name, indices in seeded)),
            {},
        ),
        "v1-empty": (delta(), {}),
        "v1-no-entries": (delta(add((7, 7), [], order=[], base_values=words(0, 4))), {}),
        "v1-many": (many(), {}),
        "v1-identity": (identity(), {}),
        "v1-extras": (delta(extras=extras()), {}),
        "v1-set": (delta(*(put(dtype) for dtype in DTYPES)), {}),
        "v1-order": (delta(ordered), {}),
        "v1-base-values": (delta(add((1000,), spread, base_values=words(31, 4))), {}),
        "v1-float64": (delta(add((1000,), spread, "float64")), {}),
        "v1-values-float32": (delta(add((1000,), spread, "float64")), {"values": "float32"}),
        "v1-values-bfloat16": (delta(add((1000,), spread)), {"values": "bfloat16"}),
        "v1-values-float16": (delta(add((1000,), spread, "bfloat16")), {"values": "float16"}),
        "v1-large": (delta(add((2**31, 2**31), [0, 2**32, 2**33 + 1, 2**62 - 1])), {}),
        "v1-bfloat16-extra": (
            delta(extras={"score.weight": np.array([[1.5, -2.0]], ml_dtypes.bfloat16)}),
            {},
        ),
        "v2-adapter": (adapter_delta(), {}),
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, (content, how) in golden().items():
        path = FOLDER / f"{name}.sdelta"
        if not path.exists():
            save(content, path, **how)
