"""How a delta came to be, told in the deltas made of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from deltakit.delta import SparseDelta
from deltakit.dtypes import dtype_of


def digest(delta: SparseDelta) -> str:
    """16 hexadecimal digits of BLAKE2b over what a delta holds: tensors and extras, bit for bit,
    and what rebuilds its adapter.

    The same for a delta in memory and in a file, whatever its name, order of unmasking, base
    identity or provenance are.
    """
    seen = hashlib.blake2b(digest_size=8)
    for name, tensor in delta.tensors.items():
        head = [name, list(tensor.shape), tensor.dtype, tensor.mode, tensor.nnz]
        seen.update(json.dumps(head).encode())
        seen.update(tensor.indices.data)
        seen.update(tensor.values.data)
        if tensor.base_values is not None:
            seen.update(b"base")
            seen.update(tensor.base_values.data)
    if delta.adapter is not None:  # whose values stand for others under another seed or kind
        seen.update(json.dumps(asdict(delta.adapter), sort_keys=True).encode())
    for name, extra in delta.extras.items():
        seen.update(json.dumps([name, list(extra.shape), dtype_of(extra).name]).encode())
        seen.update(extra.tobytes())
    return seen.hexdigest()


def brief(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A provenance in short: its plain values, its lineage, and of what it was made by name."""
    told = {key: value for key, value in provenance.items() if _is_plain(value)}
    if "lineage" in provenance:
        told["lineage"] = provenance["lineage"]
    if isinstance(provenance.get("sources"), list):
        told["sources"] = [
            {key: value for key, value in source.items() if _is_plain(value)}
            for source in provenance["sources"]
            if isinstance(source, Mapping)
        ]
    return told


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))
