"""A bitmap: one bit per element, for supports of more than about one element in eight."""

from __future__ import annotations

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import FormatError
from deltakit.formats.coding import Offer, Place
from deltakit.formats.rice import ones


class Bitmap:
    """Bit i, from the most significant bit of the first byte on, tells whether i is an index."""

    @staticmethod
    def offer(indices: Array, place: Place) -> Offer | None:
        """Any support that is not empty."""
        if not len(indices):
            return None

        def encode() -> bytes:
            chosen = np.zeros(place.numel, np.bool_)
            chosen[indices] = True
            return np.packbits(chosen).tobytes()

        return Offer((place.numel + 7) // 8, encode)

    @staticmethod
    def decode(data: bytes, place: Place) -> Array:
        """See `Coding.decode`."""
        if len(data) != (place.numel + 7) // 8:
            raise FormatError(
                f"{place.where}: a bitmap of {place.numel} elements takes "
                f"{(place.numel + 7) // 8} bytes, found {len(data)}"
            )
        indices = ones(data, place.count, place.where)
        if place.count and indices[-1] >= place.numel:
            raise FormatError(f"{place.where}: the padding bits of the bitmap are not zero")
        return indices
