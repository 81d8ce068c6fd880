"""Full supports: every element is an entry, and no index needs to be written."""

from __future__ import annotations

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import FormatError
from deltakit.formats.coding import Offer, Place


class Dense:
    """All elements, in no bytes."""

    @staticmethod
    def offer(indices: Array, place: Place) -> Offer | None:
        """Full supports only."""
        return Offer(0, bytes) if len(indices) == place.numel else None

    @staticmethod
    def decode(data: bytes, place: Place) -> Array:
        """See `Coding.decode`."""
        if data or place.count != place.numel:
            raise FormatError(
                f"{place.where}: a dense support has all {place.numel} elements and no bytes, "
                f"found {place.count} entries and {len(data)} bytes"
            )
        return np.arange(place.numel, dtype=np.int64)
