"""Index codings and file size: bits per index against entropy, speed, and one whole file.

    python benchmarks/codings.py

Prints three tables: bits per index of the smallest coding and the entropy bound log2 C(N, k) / k
for uniform supports; millions of entries per second of processor time for 10 million entries; and
the size of an .sdelta file of 103,000 entries of a model with the shapes of DeBERTa-v3-base.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np

from deltakit.delta import BaseIdentity, Fingerprint, SparseDelta, TensorDelta
from deltakit.dtypes import Array
from deltakit.entropy import support_bits
from deltakit.formats import codings
from deltakit.formats.coding import Place
from deltakit.formats.header import layout
from deltakit.formats.sdelta import encode, parse_header

DENSITIES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 6e-2, 1e-1)
ENTRIES = 1_000_000


def support(rng: np.random.Generator, numel: int, count: int) -> Array:
    """A uniform support of exactly `count` of `numel` elements, sorted int64."""
    drawn = np.unique(rng.integers(0, numel, count + count // 5 + 100))
    while len(drawn) < count:
        drawn = np.union1d(drawn, rng.integers(0, numel, count))
    return np.sort(rng.permutation(drawn)[:count])


def bits_table(rng: np.random.Generator) -> None:
    """Bits per index against entropy."""
    print(f"{'density':>9} {'coding':>8} {'bits':>8} {'entropy':>8} {'ratio':>7}")
    for density in DENSITIES:
        numel = round(ENTRIES / density)
        name, offer = codings.choose(support(rng, numel, ENTRIES), Place("w", (numel,), ENTRIES))
        spent, bound = 8 * offer.size / ENTRIES, support_bits(numel, ENTRIES) / ENTRIES
        print(f"{density:>9.3%} {name:>8} {spent:8.3f} {bound:8.3f} {spent / bound:7.4f}")


def seconds(work: Callable[[], object], rounds: int = 7) -> float:
    """Median processor time of `work`, which runs on one thread."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return median(times)


def speed_table(rng: np.random.Generator, count: int = 10_000_000) -> None:
    """Entries per second of each coding that can hold 10 million entries."""
    print(f"{'coding':>8} {'density':>8} {'encode M/s':>11} {'decode M/s':>11}")
    shape = (count // 10, 10_000)
    indices = support(rng, count * 1000, count)
    cases = {
        "rice": (shape, indices),
        "bitmap": ((count * 4,), support(rng, count * 4, count)),
        "rows": (shape, np.arange(0, count)),
    }
    for name, (dims, chosen) in cases.items():
        place = Place("w", dims, len(chosen))
        coding = codings.CODINGS[name]

        def write() -> bytes:
            offer = coding.offer(chosen, place)  # noqa: B023
            assert offer is not None
            return offer.encode()

        data = write()
        encoding = seconds(write)
        decoding = seconds(lambda: coding.decode(data, place))  # noqa: B023
        speeds = (len(chosen) / 1e6 / taken for taken in (encoding, decoding))
        density = len(chosen) / place.numel
        print(f"{name:>8} {density:8.2%} " + " ".join(f"{speed:11.1f}" for speed in speeds))


def deberta_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of DeBERTa-v3-base (He et al. 2021), 184 M weights."""
    hidden, inner = 768, 3072
    shapes: dict[str, tuple[int, ...]] = {"embeddings.word_embeddings.weight": (128_100, hidden)}
    norms = ["embeddings.LayerNorm", "encoder.LayerNorm"]
    shapes["encoder.rel_embeddings.weight"] = (512, hidden)
    for layer in range(12):
        at = f"encoder.layer.{layer}"
        sizes = {
            f"attention.self.{part}_proj": (hidden, hidden) for part in ("query", "key", "value")
        }
        sizes["attention.output.dense"] = (hidden, hidden)
        sizes |= {"intermediate.dense": (inner, hidden), "output.dense": (hidden, inner)}
        for part, size in sizes.items():
            shapes[f"{at}.{part}.weight"] = size
            shapes[f"{at}.{part}.bias"] = size[:1]
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
    for norm in norms:
        shapes |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
    return {f"deberta.{name}": shape for name, shape in shapes.items()}


def deberta_delta(rng: np.random.Generator, count: int = 103_000) -> SparseDelta:
    """A delta over all tensors, `count` entries at uniformly random places of the whole model."""
    shapes = deberta_shapes()
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    places = support(rng, sum(sizes), count)
    tensors, prints, start = {}, {}, 0
    for (name, shape), size in zip(shapes.items(), sizes, strict=True):
        here = places[(places >= start) & (places < start + size)] - start
        start += size
        values = rng.standard_normal(len(here)).astype(np.float32) * np.float32(1e-2)
        tensors[name] = TensorDelta(
            name=name, shape=shape, dtype="float32", mode="add", indices=here, values=values
        )
        prints[name] = Fingerprint(sample=rng.bytes(8).hex(), support=rng.bytes(8).hex())
    base = BaseIdentity(
        model_id="microsoft/deberta-v3-base",
        revision=rng.bytes(20).hex(),
        total_weights=sum(sizes),
        tensors=prints,
    )
    return SparseDelta(tensors=tensors, base=base, provenance={"method": "id3", "budget": count})


def file_table(rng: np.random.Generator) -> None:
    """Where the bytes of the DeBERTa-shaped file go."""
    delta = deberta_delta(rng)
    touched = SparseDelta(
        tensors={name: t for name, t in delta.tensors.items() if t.nnz},
        base=delta.base,
        provenance=delta.provenance,
    )
    total = sum(t.numel for t in delta.tensors.values())
    print(f"{len(delta.tensors)} tensors, {total:,} weights, {delta.nnz:,} entries, bfloat16")
    for what, given in (("all tensors", delta), ("touched only", touched)):
        data = encode(given, values="bfloat16")
        header, body = parse_header(data, len(data), what)
        streams = {name: entry.nbytes for name, entry in layout(header).items()}
        print(f"{what}: {len(data):,} bytes = header {body:,} + {streams}")


def main() -> None:
    """Print all tables."""
    bits_table(np.random.default_rng(0))
    speed_table(np.random.default_rng(0))
    file_table(np.random.default_rng(0))


if __name__ == "__main__":
    main()
