"""Initial values of adapters that follow from the base's tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deltakit.adapter import Adapter
from deltakit.adapters.initial import Computed
from deltakit.dtypes import Array
from deltakit.errors import DeltaError

ROW_NORM = "row-norm"

Read = Callable[[str], Array]  # the base's name of a module -> its weight, in any float dtype


def from_base(adapter: Adapter, read: Read) -> Computed:
    """What the `computed` rules of an adapter give, for `deltakit.adapters.initial`.

    "row-norm": the Euclidean norms of the weight's rows, one for each output (the magnitudes of
    DoRA: Liu et al., 2024, section 4). Raises DeltaError for a rule that is not known.
    """
    transposed = bool(adapter.config.get("fan_in_fan_out"))

    def computed(module: str, how: str, shape: tuple[int, ...]) -> Array:
        from deltakit.adapters.fold_dora import norms

        if how != ROW_NORM:
            raise DeltaError(f"adapter {adapter.kind!r}: no rule is known to compute {how!r}")
        weight = read(module)
        matrix = weight.reshape(len(weight), -1)

        def rows(start: int, stop: int) -> Array:
            return np.asarray(matrix[start:stop].astype(np.float32))

        return norms(rows, matrix.shape, transposed).reshape(shape)

    return computed
