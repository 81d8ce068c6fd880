"""Golomb-Rice coded gaps: near the entropy of a random support, at NumPy's speed.

A strictly increasing list s becomes gaps g[0] = s[0], g[i] = s[i] - s[i-1] - 1. With a parameter b
each gap splits into a quotient g >> b and a remainder of b bits. All quotients stand in one stream
in unary (that many 0 bits and a 1), all remainders in another in b bits each. Kept apart, both
streams decode without a loop over entries: the i-th 1 of the unary stream stands at bit
i + sum of the first i + 1 quotients.

Source: Golomb, "Run-length encodings" (1966); Rice and Plaunt, "Adaptive variable-length coding
for efficient compression of spacecraft television data" (1971).
"""

from __future__ import annotations

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import FormatError
from deltakit.formats import bits
from deltakit.formats.coding import Offer, Place

MAX_PARAMETER = 62  # gaps are below 2^62
_CHUNK = 1 << 15  # bytes of a bit stream looked at in one go


def offer_set(values: Array, prefix: bytes = b"") -> Offer:
    """An offer to write `prefix` and then `values`, int64 [n], strictly increasing from 0 on."""
    if not len(values):
        return Offer(len(prefix), lambda: prefix)
    gaps = np.diff(values, prepend=-1)
    gaps -= 1
    parameter, quotients = _best_parameter(gaps)
    unary = (len(gaps) + quotients + 7) // 8
    size = len(prefix) + 1 + unary + bits.packed_size(len(gaps), parameter)
    return Offer(size, lambda: prefix + _encode(gaps, parameter, quotients))


def decode_set(data: bytes, count: int, universe: int, what: str) -> Array:
    """The `count` strictly increasing values below `universe` in `data`, int64 [count].

    Raises FormatError starting with `what` when `data` is not exactly one encoding of such values.
    """
    if not count:
        if data:
            raise FormatError(f"{what}: {len(data)} bytes of indices for no entries")
        return np.zeros(0, np.int64)
    tail = bits.packed_size(count, data[0]) if data else 0
    if not data or data[0] > MAX_PARAMETER or len(data) <= 1 + tail:
        raise FormatError(f"{what}: {len(data)} bytes cannot hold {count} Rice coded indices")
    parameter = data[0]
    unary = data[1 : len(data) - tail]
    quotients = ones(unary, count, what)
    if quotients[-1] >> 3 != len(unary) - 1:
        raise FormatError(f"{what}: the index stream goes on behind its last entry")
    quotients -= np.arange(count)  # now the sums of the quotients so far
    if int(quotients[-1]) << parameter >= universe:
        raise _beyond(what, universe)
    values = np.left_shift(quotients, parameter, out=quotients)
    if parameter:
        remainders = bits.unpack(data[len(data) - tail :], count, parameter, what)
        values += _sums(remainders, parameter, universe, what)
    values += np.arange(count)
    if values[-1] >= universe:
        raise _beyond(what, universe)
    return values


def ones(stream: bytes, count: int, what: str) -> Array:
    """Positions of the 1 bits of `stream`, int64 [count], most significant bit of each byte first.

    Raises FormatError unless there are exactly `count` of them.
    """
    positions = np.empty(count, np.int64)
    found = 0
    for start in range(0, len(stream), _CHUNK):
        chunk = np.frombuffer(stream, np.uint8, min(_CHUNK, len(stream) - start), start)
        here = np.flatnonzero(np.unpackbits(chunk).view(np.bool_))
        if found + len(here) > count:
            raise FormatError(f"{what}: the index stream holds more than {count} entries")
        np.add(here, 8 * start, out=positions[found : found + len(here)])
        found += len(here)
    if found != count:
        raise FormatError(f"{what}: the index stream holds {found} entries, expected {count}")
    return positions


class Rice:
    """Golomb-Rice coded gaps of the indices."""

    @staticmethod
    def offer(indices: Array, place: Place) -> Offer | None:
        """Any support."""
        return offer_set(indices)

    @staticmethod
    def decode(data: bytes, place: Place) -> Array:
        """See `Coding.decode`."""
        return decode_set(data, place.count, place.numel, place.where)


def _best_parameter(gaps: Array) -> tuple[int, int]:
    """The parameter with the smallest exact cost in bits, and the sum of its quotients.

    The cost n * (1 + b) + sum(g >> b) is convex in b, so walking down from a good guess finds the
    smallest; of equals it is the lower b.
    """

    def quotients(parameter: int) -> int:
        return int((gaps >> parameter).sum())

    total = int(gaps.sum())  # at most the last value, so no overflow
    parameter = min(MAX_PARAMETER, max(0, (total // len(gaps)).bit_length() - 1))
    here = quotients(parameter)
    while parameter < MAX_PARAMETER and here - (above := quotients(parameter + 1)) > len(gaps):
        parameter, here = parameter + 1, above
    while parameter and (below := quotients(parameter - 1)) - here <= len(gaps):
        parameter, here = parameter - 1, below
    return parameter, here


def _encode(gaps: Array, parameter: int, quotients: int) -> bytes:
    ends = gaps >> parameter
    ends += 1
    np.cumsum(ends, out=ends)
    ends -= 1
    unary = np.zeros(len(gaps) + quotients, np.bool_)
    unary[ends] = True
    remainders = gaps & ((1 << parameter) - 1)
    return bytes([parameter]) + np.packbits(unary).tobytes() + bits.pack(remainders, parameter)


def _sums(remainders: Array, parameter: int, universe: int, what: str) -> Array:
    """Running sums of `remainders`, checked where they might pass int64."""
    sums = np.cumsum(remainders, out=remainders)
    # One remainder is below 2^62 and so is the universe: the first sum beyond it is still exact.
    if len(sums) << parameter >= 2**62 and (sums.min() < 0 or sums.max() >= universe):
        raise _beyond(what, universe)
    return sums


def _beyond(what: str, universe: int) -> FormatError:
    return FormatError(f"{what}: an index lies beyond the last of {universe} elements")
