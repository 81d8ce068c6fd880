"""Arrays by name as the bytes of a safetensors file; equal arrays give equal bytes."""

from __future__ import annotations

from collections.abc import Mapping

from deltakit.dtypes import Array, dtype_of
from deltakit.formats.safetensors_header import Entry, render


def encode(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """The file, its tensors laid out as safetensors' own library does it: wider elements first,
    then in bytewise order of the names."""
    ordered = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name.encode()))
    entries, at = {}, 0
    for name in ordered:
        array = arrays[name]
        entries[name] = Entry(dtype_of(array).code, array.shape, at, at + array.nbytes)
        at += array.nbytes
    return render(entries, metadata) + b"".join(arrays[name].tobytes() for name in ordered)
