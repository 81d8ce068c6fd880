"""Fixed-width bit fields, most significant bit first, packed and unpacked by NumPy.

Eight fields of `width` bits fill exactly `width` bytes, so the j-th field of every such group
starts at the same bit of its group. Each of the eight phases is therefore one strided operation,
without a matrix of single bits in between.
"""

from __future__ import annotations

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import FormatError

MAX_WIDTH = 63  # an unsigned field must fit int64
_BLOCK = 8192  # groups at a time, so that the work stays in the cache


def packed_size(count: int, width: int) -> int:
    """Bytes of `count` fields of `width` bits."""
    return (count * width + 7) // 8


def pack(values: Array, width: int) -> bytes:
    """`values`, non-negative integers below 2^width of shape [n], as ceil(n * width / 8) bytes.

    Field i stands in bits [i * width, (i + 1) * width) of the result, counted from the most
    significant bit of the first byte; the last byte is filled up with zero bits.
    """
    if not width:
        return b""
    word = np.dtype(np.uint32 if width <= 32 else np.uint64)
    groups = -(-len(values) // 8)
    out = np.empty((groups, width), np.uint8)
    for low in range(0, groups, _BLOCK):
        part = values[8 * low : 8 * (low + _BLOCK)]
        fields = np.zeros((-(-len(part) // 8), 8), word)
        fields.reshape(-1)[: len(part)] = part
        out[low : low + _BLOCK] = _bytes_of(np.ascontiguousarray(fields.T), width).T
    return out.tobytes()[: packed_size(len(values), width)]


def _bytes_of(fields: Array, width: int) -> Array:
    """[8, groups] fields -> [width, groups] bytes."""
    planes = np.zeros((width, fields.shape[1]), np.uint8)
    for phase, field in enumerate(fields):
        end = (phase + 1) * width  # the bit behind this field
        for byte in range(phase * width // 8, (end - 1) // 8 + 1):
            left = 8 * (byte + 1) - end
            shifted = field << left if left >= 0 else field >> -left
            planes[byte] |= shifted.astype(np.uint8)
    return planes


def unpack(data: bytes, count: int, width: int, what: str) -> Array:
    """The `count` fields of `width` bits in `data`, int64 [count]; the inverse of `pack`.

    Raises FormatError starting with `what` when `data` has another size than the fields need or
    holds bits behind the last field.
    """
    if len(data) != packed_size(count, width):
        raise FormatError(
            f"{what}: {count} fields of {width} bits take {packed_size(count, width)} bytes, "
            f"found {len(data)}"
        )
    if not data:
        return np.zeros(count, np.int64)
    if data[-1] & ((1 << (-count * width % 8)) - 1):
        raise FormatError(f"{what}: the padding bits behind the last field are not zero")
    groups = -(-count // 8)
    buffer = np.zeros(groups * width + 8, np.uint8)  # room to load whole words at the end
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    out = np.empty((groups, 8), np.int64)
    for low in range(0, groups, _BLOCK):
        for phase in range(8):
            part = out[low : low + _BLOCK, phase]
            part[:] = _field(buffer[low * width :], len(part), width, phase * width, width)
    return out.reshape(-1)[:count]


def _field(buffer: Array, groups: int, stride: int, bit: int, width: int) -> Array:
    """The `width` bits from bit `bit` of each group of `stride` bytes, unsigned [groups]."""
    if width > 57:  # with up to 7 bits before it, it may not fit one 64-bit word
        high = _field(buffer, groups, stride, bit, width - 32).astype(np.uint64)
        low = _field(buffer, groups, stride, bit + width - 32, 32)
        return np.asarray(high << np.uint64(32) | low)
    byte, lead = divmod(bit, 8)
    size = 4 if lead + width <= 32 else 8
    words = np.ndarray((groups,), f">u{size}", buffer, byte, (stride,)).astype(f"=u{size}")
    words >>= words.dtype.type(8 * size - lead - width)
    words &= words.dtype.type((1 << width) - 1)
    return words
