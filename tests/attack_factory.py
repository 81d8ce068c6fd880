"""Files made to deceive, every digest in them correct: an attacker can compute digests too."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden_deltas import FOLDER

from deltakit.errors import FormatError
from deltakit.formats.header_json import digest
from deltakit.formats.sdelta import load

Edit = Callable[[dict[str, Any]], object]
ITEMSIZE = {"F32": 4, "U8": 1, "BF16": 2, "F64": 8}


def split(data: bytes) -> tuple[dict[str, Any], dict[str, Any], dict[str, bytes]]:
    """The safetensors header, the sdelta header and the streams of a file."""
    length = int.from_bytes(data[:8], "little")
    outer, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header = json.loads(outer.pop("__metadata__")["sdelta"])["header"]
    ranges = {name: slice(*entry["data_offsets"]) for name, entry in outer.items()}
    return outer, header, {name: body[where] for name, where in ranges.items()}


def sealed(header: str) -> str:
    """`header` with a correct digest: the attacker can compute one."""
    return f'{{"header":{header},"sha256":"{digest(header.encode())}"}}'


def joined(outer: dict[str, Any] | str, body: bytes) -> bytes:
    text = outer if isinstance(outer, str) else json.dumps(outer, separators=(",", ":"))
    return len(text.encode()).to_bytes(8, "little") + text.encode() + body


def forged(name: str, edit: Edit = bool, streams: dict[str, bytes] | None = None) -> bytes:
    """A golden file whose header went through `edit` and whose streams were replaced.

    streams: "indices" and so on. Lengths in the safetensors header, digests of the one tensor's
    streams and the digest of the header are made right again, so that only the deceit is wrong.
    """
    outer, header, parts = split((FOLDER / f"{name}.sdelta").read_bytes())
    for key, stream in (streams or {}).items():
        full = next(n for n in parts if n.split(".")[1] == key)
        parts[full] = stream
        header["common"][f"{key}_sha256"] = digest(stream)
        if key == "indices":
            header["common"]["index_bytes"] = len(stream)
    edit(header)
    position = 0
    for full, entry in outer.items():
        size = len(parts[full])
        if full.startswith("sdelta."):
            entry["shape"] = [size // ITEMSIZE[entry["dtype"]]]
        entry["data_offsets"] = [position, position + size]
        position += size
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    return joined({"__metadata__": {"sdelta": sealed(text)}} | outer, b"".join(parts.values()))


def refused(
    data: bytes, folder: Path, message: str = r"attack\.sdelta", kind: Any = FormatError
) -> None:
    """Loading `data` raises `kind` matching `message`, and takes at most 1 MB to do so."""
    path = folder / "attack.sdelta"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(kind, match=message) as caught:
            load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert "attack.sdelta" in str(caught.value)
    assert peak < 2**20 + 20 * len(data)
