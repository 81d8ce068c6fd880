"""A digest of all weights of a model that follows its changes in O(entries).

The weights, read as 16-bit words w (single bytes of 8-bit dtypes), in blocks b of 2^16 words, give

    digest = sum over tensors t of  K(t) + sum over b of Q(t, b) * sum over j of P(j) * w(t, b, j)

modulo 2^64. P, K and the odd Q are words of Philox (`deltakit.formats.seeded`), those of a tensor
keyed by its name, dtype and shape. The digest is a function of the state alone, not of the patches
that led there, and the sum is linear: changing some words adds their keys times the differences.
So whoever knows the old and the new bits of a patch's entries gets from one state's digest to the
next without the rest of the model.

Two states that differ by accident have different digests but for a chance below 2^-43: differences
of words are below 2^16, so a sum of them with random 64-bit keys vanishes modulo 2^64 that rarely
(multilinear hashing: Carter and Wegman, "Universal classes of hash functions", 1979; incremental:
Bellare and Micciancio, "A new paradigm for collision-free hashing", 1997). The keys are public: the
digest detects mistakes and says nothing about forgeries, against which a file needs a signature.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from deltakit.dtypes import Array, DType
from deltakit.formats.seeded import philox_words

_BLOCK = 2**16  # words that share the keys P; also the entries looked at in one go
_STREAM = "state digest"


class TensorKeys:
    """The keys of one tensor: `whole` sums all of it, `change` what a few entries make of it."""

    def __init__(self, name: str, shape: tuple[int, ...], kind: DType) -> None:
        self._split = max(1, kind.itemsize // 2)  # words per element
        words = int(np.prod(shape, dtype=np.int64)) * self._split
        stream = f"{_STREAM} {kind.name} {'x'.join(str(n) for n in shape)}"
        drawn = philox_words(0, name, 1 + -(-words // _BLOCK), stream)
        self._own = int(drawn[0])
        self._blocks = drawn[1:] | np.uint64(1)

    def whole(self, words: Array) -> int:
        """The tensor's term of the digest; words: its raw bits, unsigned integers [numel]."""
        narrow = self._narrow(words)
        total = self._own
        for number, key in enumerate(self._blocks):
            block = narrow[number * _BLOCK : (number + 1) * _BLOCK].astype(np.uint64)
            total += int(key) * int(np.dot(block, _shared_keys()[: len(block)]))
        return total

    def change(self, indices: Array, before: Array, after: Array) -> int:
        """What is added to the digest when the elements at `indices`, int64 [n], change.

        before, after: their raw bits, unsigned integers [n].
        """
        total = 0
        for start in range(0, len(indices), _BLOCK):
            part = slice(start, start + _BLOCK)
            at = indices[part]
            if self._split > 1:
                at = (at[:, None] * self._split + np.arange(self._split)).reshape(-1)
            keys = _shared_keys()[at % _BLOCK] * self._blocks[at // _BLOCK]
            difference = self._narrow(after[part]).astype(np.uint64)
            difference -= self._narrow(before[part])
            total += int(np.dot(keys, difference))
        return total

    def _narrow(self, words: Array) -> Array:
        return np.ascontiguousarray(words).view(np.uint16) if words.itemsize > 1 else words


def hexadecimal(total: int) -> str:
    """The digest as it is written: 16 lower-case hexadecimal digits."""
    return f"{total % 2**64:016x}"


@cache
def _shared_keys() -> Array:
    return philox_words(0, "", _BLOCK, _STREAM)
