"""What training, files and merges cost at any size, by formulas that a reader can redo by hand.

All sizes are in bytes. P: weights of the model, b: bytes of one while training, k: trained entries,
n: ranks, d = k / P. Comments name the lines of deltakit or of torch that a number comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, expm1, log1p, log2, prod

from scaling_shapes import Model, elements

# Per entry in training: value, gradient, base value and order (`Entries`), Adam's two moments
# (`SparseAdamW`), index and slot in int64 (`Target`).
ENTRY = 4 + 4 + 4 + 4 + 2 * 4 + 8 + 8
# Per entry on a fixed support: its column in the sparse rows (`tapped_layer.compressed`), the carrier
# of its gradient and its slot in order of indices (`FixedSupport._carried`).
TAP = 4 + 4 + 8
# Per entry while the optimizer steps, activations being gone: ages in int64, two bias corrections and
# two arrays of the update (`optimizer._adamw`). On CPUs bias corrections are single numbers where all
# entries are of one age.
UPDATE, ALIKE = 8 + 4 * 4, 8 + 2 * 4
# Per entry in optimizer.pt: value, base value, order, index, slot, moments (`entries_state`).
SAVED = 4 + 4 + 4 + 8 + 8 + 2 * 4

FULL = 4 + 4 + 2 * 4  # per weight of full fine-tuning: float32 weight, gradient, AdamW's moments
BUCKET = 4  # and of DistributedDataParallel's copy of the gradient
LORA_RANK = 16

PAGE = 4096
SCATTERED = 2**15  # bytes per entry from which on `SafetensorsFile.gather` reads pages one by one
SAMPLES = 1024  # per tensor, by which a base is known
HEADER = 200  # of an .sdelta file per tensor: name, shape, digests


@dataclass(frozen=True)
class Memory:
    """Peak memory of one rank, activations left out.

    held: what stays all the time. backward, update: what comes on top in the one and in the other
    part of a step, which never stand together.
    """

    held: Mapping[str, float]
    backward: Mapping[str, float]
    update: Mapping[str, float]

    @property
    def above(self) -> float:
        """The larger of the two parts."""
        return max(sum(self.backward.values()), sum(self.update.values()))

    @property
    def peak(self) -> float:
        """What is held, and the larger part of a step."""
        return sum(self.held.values()) + self.above


def full_parallel(model: Model, n: int, b: int = 2) -> Memory:
    """Full fine-tuning with `DistributedDataParallel`, float32 weights under autocast."""
    held = {"weights": 4, "gradients": 4, "optimizer": 8, "buckets": BUCKET}
    return Memory({name: each * model.weights for name, each in held.items()}, {}, {})


def full_sharded(model: Model, n: int, b: int = 2) -> Memory:
    """Full fine-tuning with FSDP2: float32 shards, layers in b bytes."""
    share = model.weights / n
    held = {"weights": 4 * share, "gradients": 4 * share, "optimizer": 8 * share}
    return Memory(held, _all_gradients(model, b), {})


def lora_parallel(model: Model, n: int, b: int = 2) -> Memory:
    """LoRA of rank 16 on all matrices of the layers, in float32 as PEFT keeps it."""
    factors = LORA_RANK * model.features
    return Memory({"weights": b * model.weights, "adapters": (FULL + BUCKET) * factors}, {}, {})


def lora_sharded(model: Model, n: int, b: int = 2) -> Memory:
    """The same under FSDP2."""
    held = {"weights": b * model.weights / n, "adapters": FULL * LORA_RANK * model.features / n}
    return Memory(held, unsharded(model, b), {})


def fixed_parallel(model: Model, n: int, k: int, b: int = 2, *, update: int = UPDATE) -> Memory:
    """A fixed support, data parallel: every rank holds all of it. Experts that are held together
    have no taps: their entries are taken out of dense gradients, one at a time."""
    held: dict[str, float] = {"weights": b * model.weights, "entries": ENTRY * k}
    held["taps"] = TAP * k * (1 - model.fused_share) + 4 * model.rows
    backward = {"gradients": b * model.largest} if model.fused else {}
    return Memory(held, backward, {"update": update * k})


def selecting_parallel(model: Model, n: int, k: int, b: int = 2) -> Memory:
    """ID3 in a step that selects, `exact`, data parallel: one dense gradient at a time."""
    held = {"weights": b * model.weights, "entries": ENTRY * k}
    return Memory(held, {"gradients": b * model.largest}, {"update": UPDATE * k})


def fixed_sharded(model: Model, n: int, k: int, b: int = 2, *, update: int = UPDATE) -> Memory:
    """A fixed support under FSDP2: entries are shared out. Of all that are tapped a rank has column,
    carrier, the sum of gradients, and in the collective a flat copy of these (`ShardedAveraging`)."""
    tapped = k * (1 - model.fused_share)
    held = {"weights": b * model.weights / n, "entries": (ENTRY + 8) * k / n}
    held |= {"taps": (4 + 4) * tapped + 4 * model.rows, "gradients": 4 * tapped}
    at_the_end = {"update": max(4 * tapped, update * k / n)}
    return Memory(held, unsharded(model, b, layer=model.fused), at_the_end)


def selecting_sharded(model: Model, n: int, k: int, b: int = 2) -> Memory:
    """ID3 in a step that selects, under FSDP2, whose own reduce-scatter averages the gradients."""
    held = {"weights": b * model.weights / n, "entries": ENTRY * k / n}
    return Memory(held, _all_gradients(model, b), {"update": UPDATE * k / n})


def _all_gradients(model: Model, b: int) -> Mapping[str, float]:
    head = prod(model.rest["lm_head.weight"])
    return unsharded(model, b, layer=model.unit, head=head, root=elements(model.rest))


def unsharded(
    model: Model, b: int, *, layer: int = 0, head: int = 0, root: int = 0
) -> Mapping[str, float]:
    """What FSDP2 has whole at a time, each layer being a unit of its own and the rest the root.

    A unit arrives in one buffer and is copied out of it. The root then stays whole in forward and
    backward; a layer is in use while another arrives. layer, head, root: elements of these that
    have gradients. A layer's stand beside the copy of the one's before, which is being reduced;
    the head's wait for the root's, which end the backward.
    """
    whole, unit = elements(model.rest), model.unit
    moments = [
        (2 * whole, 0),  # the forward begins
        (whole + 2 * unit, 2 * layer + head),  # in a layer
        (whole, root + layer),  # the backward ends
    ]
    most, gradients = max(moments, key=sum)
    return {"unsharded": b * most} | ({"gradients": b * gradients} if gradients else {})


def activations(model: Model, tokens: int, b: int = 2) -> float:
    """With activation checkpointing per layer: every layer's input, and the logits in b bytes with
    a float32 copy and its gradient."""
    return tokens * (len(model.layers) * model.hidden * b + model.vocabulary * (b + 4 + 4))


def sent_per_step(model: Model, n: int, k: int, b: int = 2) -> dict[str, float]:
    """Bytes that every rank sends in a step (and receives), all collectives as rings."""
    reduced = 2 * (n - 1) / n  # an all-reduce: a reduce-scatter and an all-gather
    once = (n - 1) / n
    gathered = once * b * (2 * model.weights - elements(model.rest))  # the root is gathered once
    adapters = 4 * LORA_RANK * model.features
    return {
        "full, data parallel": reduced * 4 * model.weights,
        "full, FSDP2": gathered + once * b * model.weights,
        "LoRA r16, data parallel": reduced * adapters,
        "LoRA r16, FSDP2": gathered + once * adapters,
        "selecting, data parallel": reduced * (b * model.weights + 4 * k),
        "selecting, FSDP2": gathered + once * b * model.weights,
        "fixed support, data parallel": reduced * 4 * k,
        "fixed support, FSDP2": gathered
        + reduced * 4 * k * (1 - model.fused_share)
        + once * b * model.weights * model.fused_share,
    }


def candidates_sent(model: Model, n: int, b: int = 2, share: float = 0.01) -> float:
    """At most, with `--exchange candidates`: every rank's indices go to all, and then the gradients
    at their union, which is largest where no two ranks name the same."""
    indices = (n - 1) * share * model.weights * 4
    return indices + 2 * (n - 1) / n * b * min(1, n * share) * model.weights


def entropy_bits(d: float) -> float:
    """Of the index of one entry of a random support: H(d) / d, about log2(1 / d) + 1.44."""
    return -log2(d) - (1 - d) / d * log2(1 - d)


def rice_bits(d: float) -> float:
    """What a Golomb-Rice code of the geometric gaps takes for it: a remainder of r bits, and a
    quotient in unary, which takes 1 / (1 - (1 - d)^(2^r)) bits on average."""
    return min(r + 1 / within(d, 2**r) for r in range(63))


def within(d: float, places: int) -> float:
    """The share of runs of so many places in which there is an entry: 1 - (1 - d)^places."""
    return -expm1(places * log1p(-d))


def delta_bytes(k: int, d: float, tensors: int, *, value: int = 4, seeded: bool = False) -> float:
    """An .sdelta file: k entries at density d. seeded: a random mask, whose indices a seed gives."""
    index = 0.0 if seeded else rice_bits(d) / 8
    return k * (index + value) + HEADER * tensors


def order_bytes(k: int, steps: int) -> float:
    """What the order of unmasking adds to it: the number of a step, for every entry."""
    return k * ceil(log2(steps)) / 8


def checkpoint_bytes(k: int) -> float:
    """The state of a training run with AdamW, without the model, which is not saved."""
    return SAVED * k


def pages_with_entries(size: float, d: float, b: int = 2) -> float:
    """Bytes of the pages that hold an entry, of a file of `size` with a random support."""
    return within(d, PAGE // b) * size


@dataclass(frozen=True)
class Merge:
    """Bytes that a merge reads, and writes, from a cold file cache."""

    read: float
    written: float

    def seconds(self, bandwidth: float) -> float:
        """At so many bytes per second, in and out together."""
        return (self.read + self.written) / bandwidth


def merge_to_new_file(model: Model, b: int = 2) -> Merge:
    """All of the base is read, and written."""
    return Merge(b * model.weights, b * model.weights)


def identity_read(model: Model, b: int = 2) -> float:
    """What comparing the base reads: 1,024 samples of every tensor, each of them a page or, where
    they are nearer than 32 kB to one another, all of the tensor (`deltakit.identity`)."""
    sizes = [b * prod(shape) for shape in model.tensors.values()]
    return sum(min(s, SAMPLES * PAGE) if s > SAMPLES * SCATTERED else s for s in sizes)


def journal_bytes(k: int, d: float, tensors: int, b: int = 2) -> float:
    """The journal of a merge in place: original and merged bits of the entries, and the delta."""
    return delta_bytes(k, d, tensors, value=2 * b) + delta_bytes(k, d, tensors)


def merge_in_place(model: Model, k: int, b: int = 2) -> Merge:
    """Pages with entries are read and written; where entries are nearer than 32 kB, reading through
    the mapped file brings all of it."""
    d, size = k / model.weights, b * model.weights
    pages = pages_with_entries(size, d, b)
    read = pages + identity_read(model, b) if k * SCATTERED < size else size
    return Merge(min(read, size), pages + journal_bytes(k, d, len(model.tensors), b))
