"""Initial values of adapters that follow from the base's tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deltakit.adapter import FAN_IN, Adapter
from deltakit.adapters.fold_dora import norms
from deltakit.adapters.initial import Computed, initial_values
from deltakit.dtypes import Array
from deltakit.errors import DeltaError

ROW_NORM = "row-norm"
PAIRS = "pairs"

Read = Callable[[str], Array]  # the base's name of a module -> its weight, in any float dtype


def from_base(adapter: Adapter, read: Read) -> Computed:
    """What the `computed` rules of an adapter give, for `deltakit.adapters.initial`.

    "row-norm": the Euclidean norms of the weight's rows, one for each output (the magnitudes of
    DoRA: Liu et al., 2024, section 4). "pairs": uniform values by fan-in, each column twice, so that
    the two reflections cancel (HRA: Yuan et al., 2024, section 4.1). Raises DeltaError for a rule that is not known.
    """
    transposed = bool(adapter.config.get("fan_in_fan_out"))

    def computed(module: str, how: str, shape: tuple[int, ...]) -> Array:
        if how == PAIRS:
            half = (shape[0], shape[1] // 2)
            name = f"{module}.{PAIRS}"
            drawn = initial_values({"uniform": FAN_IN}, name, half, "float32", adapter.seed)
            return np.repeat(drawn, 2, axis=1)
        if how != ROW_NORM:
            raise DeltaError(f"adapter {adapter.kind!r}: no rule is known to compute {how!r}")
        weight = read(module)
        matrix = weight.reshape(len(weight), -1)

        def rows(start: int, stop: int) -> Array:
            return np.asarray(matrix[start:stop].astype(np.float32))

        return norms(rows, matrix.shape, transposed).reshape(shape)

    return computed
