"""The header of an `.sdelta` file as JSON text, and back under suspicion.

The text is `{"header":H,"sha256":"D"}`, D being the digest of the very characters of H. All of H
is canonical JSON. The records of the tensors are rows under one list of columns; a cell that all
rows share stands once, in "common".
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from deltakit.adapter import Adapter
from deltakit.delta import BaseIdentity, Fingerprint, in_tensor_order
from deltakit.dtypes import DTYPES
from deltakit.errors import ChecksumError, DeltaError, FormatError, UnsupportedVersionError
from deltakit.formats import strict_json
from deltakit.formats.header import VERSION, ExtraRecord, SdeltaHeader, TensorRecord
from deltakit.formats.record_json import (
    COLUMNS,
    are_fingerprints,
    from_cells,
    is_size,
    is_text,
    parse_extra,
    to_cells,
)

_BEGIN, _MIDDLE, _END = '{"header":', ',"sha256":"', '"}'
_TAIL = len(_MIDDLE) + 43 + len(_END)
_KEYS = {"base", "columns", "common", "config", "extras", "provenance", "tensors", "version"}
_ADAPTER = ("kind", "config", "seed", "initial", "check")
_NEEDED = {"columns", "common", "tensors", "version"}
_BASE = {"fingerprints", "model_id", "revision", "total_weights"}


def digest(data: bytes) -> str:
    """SHA-256 of `data` in base64url without padding, 43 characters."""
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode("ascii")


def dumps(header: SdeltaHeader) -> str:
    """The JSON text of `header`."""
    rows = [to_cells(record) for record in header.tensors.values()]
    shared = [
        column
        for column in COLUMNS
        if column != "name" and rows and all(row[column] == rows[0][column] for row in rows)
    ]
    columns = [column for column in COLUMNS if column not in shared]
    content: dict[str, Any] = {
        "version": header.version,
        "columns": columns,
        "common": {column: rows[0][column] for column in shared},
        "tensors": [[row[column] for column in columns] for row in rows],
    }
    if header.base is not None:
        content["base"] = _base_json(header.base, header.tensors)
    if header.extras:
        content["extras"] = {
            extra.name: [DTYPES[extra.dtype].code, list(extra.shape), extra.sha256]
            for extra in header.extras.values()
        }
    if header.adapter is not None:
        content["adapter"] = {key: getattr(header.adapter, key) for key in _ADAPTER}
    for key, value in (("config", header.config), ("provenance", header.provenance)):
        strict_json.check_plain(dict(value), key, depth=1)
        if value:
            content[key] = dict(value)
    text = strict_json.dumps(content)
    return f"{_BEGIN}{text}{_MIDDLE}{digest(text.encode('ascii'))}{_END}"


def loads(text: str, where: str) -> SdeltaHeader:
    """The header in `text`. `where`: the file, for messages.

    Raises ChecksumError when the text differs from its digest, UnsupportedVersionError for a
    newer version, FormatError for anything that its version does not define.
    """
    if not text.startswith(_BEGIN) or text[-_TAIL : -_TAIL + len(_MIDDLE)] != _MIDDLE:
        raise FormatError(f"{where}: the sdelta header has no digest where one must stand")
    body = text[len(_BEGIN) : -_TAIL].encode("utf-8", "surrogatepass")
    if text[-_TAIL + len(_MIDDLE) :] != digest(body) + _END:
        raise ChecksumError(f"{where}: the sdelta header differs from its digest; it is damaged")
    content = strict_json.loads(body, f"{where}: sdelta header")
    _check_version(content, where)
    needed, known = _members(content["version"])
    if not needed <= set(content) <= known:
        odd = sorted((needed - set(content)) | (set(content) - known))
        raise FormatError(f"{where}: the sdelta header lacks or does not know the keys {odd}")
    tensors: dict[str, TensorRecord] = {}
    last = b""
    for cells in _rows(content, where):
        record = from_cells(cells, where)
        if tensors and record.name.encode("utf-8") <= last:
            raise FormatError(f"{where}: tensor {record.name!r} stands twice or out of order")
        tensors[record.name] = record
        last = record.name.encode("utf-8")
    return SdeltaHeader(
        tensors=tensors,
        extras=_extras(content, tensors, where),
        base=_base(content, tensors, where),
        config=_free(content, "config", where),
        provenance=_free(content, "provenance", where),
        adapter=_adapter(content, tensors, where),
    )


def _members(version: int) -> tuple[set[str], set[str]]:
    """The keys that a header of this version must have, and those that it may have."""
    return (_NEEDED, _KEYS) if version == 1 else (_NEEDED | {"adapter"}, _KEYS | {"adapter"})


def _check_version(content: Any, where: str) -> None:
    version = content.get("version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise FormatError(f"{where}: the sdelta header has no version")
    if version > VERSION:
        raise UnsupportedVersionError(
            f"{where}: sdelta version {version} is newer than version {VERSION}, the newest that "
            "this deltakit reads; upgrade deltakit-sparse"
        )


def _rows(content: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    columns, common, rows = content["columns"], content["common"], content["tensors"]
    if not isinstance(common, dict) or not isinstance(rows, list) or "name" in common:
        raise FormatError(f"{where}: columns, common and tensors of the sdelta header do not fit")
    if not set(common) <= set(COLUMNS) or columns != [c for c in COLUMNS if c not in common]:
        raise FormatError(f"{where}: the columns of the sdelta header are not those of its version")
    for row in rows:
        if not isinstance(row, list) or len(row) != len(columns):
            raise FormatError(f"{where}: a tensor's row does not have {len(columns)} cells")
        yield common | dict(zip(columns, row, strict=True))


def _extras(
    content: dict[str, Any], tensors: Mapping[str, TensorRecord], where: str
) -> dict[str, ExtraRecord]:
    found = content.get("extras", {})
    if not isinstance(found, dict):
        raise FormatError(f"{where}: extras are no JSON object")
    extras = {name: parse_extra(name, cells, where) for name, cells in found.items()}
    both = sorted(set(extras) & set(tensors))
    if both:
        raise FormatError(f"{where}: {both[0]!r} is both a sparse tensor and an extra")
    return in_tensor_order(extras)


def _adapter(
    content: dict[str, Any], tensors: Mapping[str, TensorRecord], where: str
) -> Adapter | None:
    if "adapter" not in content:
        return None
    found = _free(content, "adapter", where)
    if set(found) != set(_ADAPTER) or not is_text(found["kind"]) or not is_text(found["check"]):
        raise FormatError(f"{where}: the adapter is not described as version {VERSION} does")
    if not isinstance(found["config"], dict) or not isinstance(found["initial"], dict):
        raise FormatError(f"{where}: config and initial of the adapter must be JSON objects")
    try:
        adapter = Adapter(**found)
        for name in tensors:
            adapter.split(name)
    except DeltaError as error:
        raise FormatError(f"{where}: {error}") from None
    return adapter


def _base_json(base: BaseIdentity, tensors: Mapping[str, TensorRecord]) -> dict[str, Any]:
    others = {
        name: [print_.sample, print_.support]
        for name, print_ in base.tensors.items()
        if name not in tensors
    }
    found = {
        "model_id": base.model_id,
        "revision": base.revision,
        "total_weights": base.total_weights,
        "fingerprints": others or None,
    }
    return {key: value for key, value in found.items() if value is not None}


def _base(
    content: dict[str, Any], tensors: Mapping[str, TensorRecord], where: str
) -> BaseIdentity | None:
    prints = {
        record.name: Fingerprint(sample=record.sample, support=record.support)
        for record in tensors.values()
        if record.sample is not None
    }
    if "base" not in content:
        if prints:
            raise FormatError(f"{where}: base fingerprints without a base")
        return None
    found = content["base"]
    if not isinstance(found, dict) or not set(found) <= _BASE:
        raise FormatError(f"{where}: the base is not described as its version does")
    total, others = found.get("total_weights"), found.get("fingerprints", {})
    texts = [found.get("model_id"), found.get("revision")]
    if any(text is not None and not is_text(text) for text in texts):
        raise FormatError(f"{where}: model_id and revision of the base must be strings")
    if total is not None and not is_size(total):
        raise FormatError(f"{where}: total_weights of the base is no count")
    if not isinstance(others, dict) or set(others) & set(tensors):
        raise FormatError(f"{where}: the fingerprints of the base do not fit the tensors")
    prints |= {name: _fingerprint(name, cells, where) for name, cells in others.items()}
    return BaseIdentity(
        model_id=texts[0],
        revision=texts[1],
        total_weights=total,
        tensors=in_tensor_order(prints),
    )


def _fingerprint(name: str, cells: Any, where: str) -> Fingerprint:
    strict_json.check_text(name, where)
    if isinstance(cells, list) and len(cells) == 2 and are_fingerprints(*cells) and cells[0]:
        return Fingerprint(sample=cells[0], support=cells[1])
    raise FormatError(f"{where}: tensor {name!r}: no base fingerprint")


def _free(content: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    found = content.get(key, {})
    if not isinstance(found, dict):
        raise FormatError(f"{where}: {key} is no JSON object")
    strict_json.check_plain(found, f"{where}: {key}", depth=1)
    return found
