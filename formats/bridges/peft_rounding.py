"""Super-Tuning's arithmetic: values are rounded to the weight's dtype before they are added.

deltakit adds in float32 and rounds once. The two agree for values that the weight's dtype holds
exactly, so those are what is read from adapters and, where the base is at hand, written to them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from deltakit.delta import TensorDelta
from deltakit.dtypes import Array, DType, add_exact
from deltakit.formats.checkpoint import Checkpoint

_AS_THEY_ARE = {"float32", "float64"}  # dtypes that hold the adapters' float32


def rounded(values: Array, kind: DType) -> Array:
    """Differences as PEFT adds them: cast to the dtype of the weight, then widened again."""
    with np.errstate(over="ignore"):  # infinite then, and refused by the delta
        return np.asarray(values.astype(kind.numpy).astype(kind.compute or np.float32))


def rounding_note(dtypes: Mapping[str, DType]) -> list[str]:
    """What reading did to the values of tensors of these dtypes (by name)."""
    narrow = sorted({kind.name for kind in dtypes.values()} - _AS_THEY_ARE)
    if not narrow:
        return []
    return [f"values are rounded to {' and '.join(narrow)}, as PEFT applies them"]


def fitted(tensor: TensorDelta, base: Checkpoint) -> tuple[Array, int]:
    """float32 [nnz] which PEFT merges to the very bits that deltakit merges `tensor` to, and for
    how many entries no such value was found.

    Where the rounded difference misses, the rounded difference between merged and base weight is
    tried.
    """
    kind = tensor.kind
    if kind.name in _AS_THEY_ARE:
        return tensor.values.astype(np.float32), 0
    before = base.gather(tensor.name, tensor.indices).view(kind.numpy)
    after = add_exact(before, [(1.0, tensor.values)])
    values = rounded(tensor.values, kind)
    missed = add_exact(before, [(1.0, values)]).view(kind.words) != after.view(kind.words)
    values[missed] = rounded(after.astype(np.float32) - before.astype(np.float32), kind)[missed]
    left = add_exact(before, [(1.0, values)]).view(kind.words) != after.view(kind.words)
    return values, int(np.count_nonzero(left))


def all_fitted(
    modules: Mapping[str, TensorDelta], base: Checkpoint | None
) -> tuple[dict[str, Array], list[str]]:
    """Live module -> `fitted` values, and notes on what PEFT will merge to other bits. Without a
    base the values stay as they are."""
    narrow = " and ".join(sorted({tensor.dtype for tensor in modules.values()} - _AS_THEY_ARE))
    if base is None:
        values = {module: t.values.astype(np.float32) for module, t in modules.items()}
        note = (
            f"PEFT rounds values to {narrow} before it adds them, so its merge may differ in the "
            "last bits; with the base (--base) values are chosen that agree"
        )
        return values, [note] if narrow else []
    found = {module: fitted(tensor, base) for module, tensor in modules.items()}
    missed = sum(count for _, count in found.values())
    note = (
        f"PEFT rounds values to {narrow} before it adds them, so {missed:,} of "
        f"{sum(t.nnz for t in modules.values()):,} entries merge to slightly other values there; "
        "peft-shira has no such rounding"
    )
    return {module: values for module, (values, _) in found.items()}, [note] if missed else []
