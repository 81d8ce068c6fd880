"""Supports that a seed generates: random masks that need no indices in the file.

The words come from Philox4x64-10, a counter-based generator, keyed by the seed and the tensor's
name, so each tensor has its own draws and all platforms and versions of NumPy agree. Words become
indices by integer operations alone.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
"""

from __future__ import annotations

import hashlib
from math import isqrt

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import DeltaError, FormatError
from deltakit.formats.coding import Offer, Place

MAX_SEED = 2**64 - 1
_DOMAIN = "sdelta philox4x64-10"
_SUPPORT = "support"


def philox_words(seed: int, name: str, count: int, stream: str = "") -> Array:
    """The first `count` raw words of the generator of (stream, seed, name), uint64 [count].

    seed: 0 to 2^64 - 1. stream: the purpose, so that different uses of one seed are independent.
    Raises DeltaError for another seed or a NUL in `stream`.
    """
    return _words(_generator(seed, name, stream), count)


def seeded_support(seed: int, name: str, numel: int, count: int) -> Array:
    """`count` of `numel` elements drawn without bias, int64 [count], strictly increasing.

    They are the first `count` distinct draws below `numel`; a draw is the top bits of a word, as
    many as numel - 1 has, and is skipped when it is not below `numel`. Where `count` is more than
    half of `numel`, the elements left out are drawn instead. Takes time and memory in proportion
    to `count`. Raises DeltaError when `count` is not within 0..numel.
    """
    if not 0 <= count <= numel:
        raise DeltaError(f"tensor {name!r}: cannot draw {count} of {numel} elements")
    if 2 * count <= numel:
        return _distinct(seed, name, numel, count)
    kept = np.ones(numel, np.bool_)
    kept[_distinct(seed, name, numel, numel - count)] = False
    return np.flatnonzero(kept)


class Seeded:
    """The support that the seed in the header generates, in no bytes."""

    @staticmethod
    def offer(indices: Array, place: Place) -> Offer | None:
        """Supports that their seed generates exactly."""
        if place.seed is None or not 0 <= place.seed <= MAX_SEED:
            return None
        made = seeded_support(place.seed, place.name, place.numel, place.count)
        return Offer(0, bytes) if np.array_equal(indices, made) else None

    @staticmethod
    def decode(data: bytes, place: Place) -> Array:
        """See `Coding.decode`."""
        if data or place.seed is None:
            raise FormatError(f"{place.where}: a seeded support has a seed and no bytes")
        return seeded_support(place.seed, place.name, place.numel, place.count)


def _generator(seed: int, name: str, stream: str) -> np.random.Philox:
    if not 0 <= seed <= MAX_SEED:
        raise DeltaError(f"seed {seed} is not within 0..2^64-1")
    if "\0" in stream:
        raise DeltaError("the name of a random stream cannot hold a NUL character")
    text = "\0".join([_DOMAIN, stream, str(int(seed)), name])
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    key = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")]
    return np.random.Philox(key=np.array(key, np.uint64))


def _words(generator: np.random.Philox, count: int) -> Array:
    words: Array = np.asarray(generator.random_raw(count), np.uint64)
    return words


def _distinct(seed: int, name: str, numel: int, count: int) -> Array:
    """The first `count` distinct draws below `numel`, sorted; `count` at most numel / 2.

    As many draws as are still missing are taken at a time: never one too many.
    """
    found = drawn = np.zeros(0, np.int64)
    generator = _generator(seed, name, _SUPPORT) if count else None
    while generator is not None and (missing := count - len(found)):
        while len(drawn) < missing:
            drawn = np.concatenate([drawn, _draws(generator, numel, missing - len(drawn))])
        batch, drawn = np.sort(drawn[:missing]), drawn[missing:]
        batch = batch[np.diff(batch, prepend=-1) != 0]
        if len(found):
            at = np.searchsorted(found, batch)
            batch = batch[found[np.minimum(at, len(found) - 1)] != batch]
        found = np.sort(np.concatenate([found, batch]), kind="stable")  # merges two sorted runs
    return found


def _draws(generator: np.random.Philox, numel: int, count: int) -> Array:
    """About `count` further draws below `numel`, int64, in the order of the words."""
    width = (numel - 1).bit_length()  # at least 1, as numel is at least 2
    words = _words(generator, ((count + isqrt(count)) << width) // numel + 8)
    words >>= np.uint64(64 - width)
    return words[words < np.uint64(numel)].astype(np.int64)
