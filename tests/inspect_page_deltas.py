"""Deltas of every sort for tests of their pages: name -> delta."""

from __future__ import annotations

from typing import Any

import numpy as np
from adapter_deltas import adapter_delta

from deltakit.delta import BaseIdentity, Fingerprint, SparseDelta, TensorDelta
from deltakit.formats.seeded import seeded_support

HOSTILE = ["</script><script>throw 1</script>", "<!-- x", "a\u2028b", "rtl.\u202eweight", "nul\0"]


def tensor(name: str, shape: tuple[int, ...], count: int, **other: Any) -> TensorDelta:
    """A tensor with `count` entries at places drawn from its name."""
    random = np.random.default_rng(len(name) * 7919 + count)
    values = random.standard_normal(count).astype(np.float32) / 100
    chosen = np.sort(random.choice(int(np.prod(shape)), count, replace=False))
    if other.get("mode") == "set":
        values = values.view(np.uint32)
    given = {"mode": "add", "indices": chosen, "values": values, **other}
    return TensorDelta(name=name, shape=shape, dtype="float32", **given)


def layers(count: int = 12, entries: int = 90) -> SparseDelta:
    """A small transformer: `count` layers of a matrix, another and a vector, with order."""
    made = []
    for at in range(count):
        for part, shape in {"up": (64, 32), "down": (32, 64), "norm": (32,)}.items():
            found = min(entries + at, 2 if part == "norm" else 2048)
            order = np.sort(np.arange(found) * 37 % 100)
            made.append(tensor(f"model.layers.{at}.{part}.weight", shape, found, order=order))
    return joined(
        *made,
        extras={"head.weight": np.ones((3, 32), np.float32)},
        base=BaseIdentity(
            model_id="acme/tiny",
            total_weights=100_000,
            tensors={each.name: Fingerprint(sample="0" * 16) for each in made},
        ),
        config={"num_labels": 3},
        provenance={"method": "id3", "lr": 0.01, "task": "sequence-classification"},
    )


def joined(*tensors: TensorDelta, **other: Any) -> SparseDelta:
    """A delta of tensors."""
    return SparseDelta(tensors={each.name: each for each in tensors}, **other)


def deltas() -> dict[str, SparseDelta]:
    """One of every sort."""
    places = seeded_support(7, "layer.0.a", 200, 40)
    shapes = [("scalar", ()), ("vector", (7,)), ("conv", (4, 3, 2, 2)), ("tall", (9000, 2))]
    held = tensor("w", (20, 30), 50, mode="set", base_values=np.zeros(50, np.uint32))
    return {
        "layers": layers(),
        "empty": joined(),
        "no-entries": joined(tensor("a", (3, 4), 0), tensor("none", (3, 0, 2), 0)),
        "set-alone": joined(tensor("layer.0.up", (20, 30), 50, mode="set")),
        "set-beside-base": joined(held),
        "adapter": adapter_delta(),
        "seeded": joined(tensor("layer.0.a", (10, 20), 40, indices=places, seed=7)),
        "shapes": joined(*(tensor(name, shape, 1 if not shape else 5) for name, shape in shapes)),
        "hostile": joined(
            *(tensor(name, (20, 30), 50) for name in HOSTILE),
            provenance={"method": "<img src=x onerror=throw>", "</script>": "\u202eabc"},
        ),
    }
