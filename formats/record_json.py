"""One tensor's record as a row of cells, and back under suspicion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from deltakit.delta import MAX_NUMEL
from deltakit.dtypes import BY_CODE, DTYPES
from deltakit.errors import FormatError
from deltakit.formats import strict_json
from deltakit.formats.bits import MAX_WIDTH
from deltakit.formats.codings import CODINGS
from deltakit.formats.header import RESERVED, ExtraRecord, TensorRecord
from deltakit.formats.seeded import MAX_SEED
from deltakit.formats.values import WIDTHS

COLUMNS = (
    "name",
    "shape",
    "dtype",
    "trained_dtype",
    "mode",
    "nnz",
    "coding",
    "seed",
    "index_bytes",
    "indices_sha256",
    "value_dtype",
    "values_sha256",
    "order_bits",
    "order_sha256",
    "base_values",
    "base_values_sha256",
    "sample",
    "support",
)
_DTYPES = ("dtype", "trained_dtype", "value_dtype")
_DIGEST = re.compile(r"[A-Za-z0-9_-]{43}")
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")


def to_cells(record: TensorRecord) -> dict[str, Any]:
    """Column -> cell of `record`; dtypes by their codes in safetensors."""
    cells: dict[str, Any] = {column: getattr(record, column) for column in COLUMNS}
    codes = {column: DTYPES[cells[column]].code for column in _DTYPES}
    return cells | {"shape": list(record.shape)} | codes


def from_cells(cells: Mapping[str, Any], where: str) -> TensorRecord:
    """The record in `cells`, every column of it checked; FormatError where one is wrong."""
    name = cells["name"]
    if not is_text(name):
        raise FormatError(f"{where}: a tensor's name is no text")
    what = f"{where}: tensor {name!r}"
    checks = {
        "shape": is_shape(cells["shape"]),
        "mode": cells["mode"] in ("add", "set"),
        "coding": cells["coding"] in CODINGS.names(),
        "nnz": is_size(cells["nnz"]),
        "index_bytes": is_size(cells["index_bytes"]),
        "seed": cells["seed"] is None or is_size(cells["seed"], MAX_SEED),
        "order_bits": cells["order_bits"] is None or is_size(cells["order_bits"], MAX_WIDTH),
        "base_values": isinstance(cells["base_values"], bool),
        "sample": are_fingerprints(cells["sample"], cells["support"]),
        **{
            column: isinstance(cells[column], str) and cells[column] in BY_CODE
            for column in _DTYPES
        },
    }
    for column, right in checks.items():
        if not right:
            raise FormatError(f"{what}: {column} cannot be {_short(cells[column])}")
    names = {column: BY_CODE[cells[column]].name for column in _DTYPES}
    record = TensorRecord(**{**cells, **names, "shape": tuple(cells["shape"])})
    _check_together(record, what)
    return record


def parse_extra(name: str, cells: Any, where: str) -> ExtraRecord:
    """The record of one extra; FormatError where it is wrong."""
    strict_json.check_text(name, where)
    what = f"{where}: extra {name!r}"
    if name.startswith(RESERVED) or name == "__metadata__":
        raise FormatError(f"{what}: this name is reserved")
    if not isinstance(cells, list) or len(cells) != 3 or not is_shape(cells[1]):
        raise FormatError(f"{what} must have a dtype, a shape and a digest")
    if not isinstance(cells[0], str) or cells[0] not in BY_CODE:
        raise FormatError(f"{what}: dtype cannot be {_short(cells[0])}")
    record = ExtraRecord(name, BY_CODE[cells[0]].name, tuple(cells[1]), cells[2])
    _check_digest(record.nbytes, record.sha256, what)
    return record


def is_text(found: Any) -> bool:
    """Whether `found` is a string that has a UTF-8 form."""
    return isinstance(found, str) and not any("\ud800" <= c <= "\udfff" for c in found)


def is_size(found: Any, most: int = MAX_NUMEL) -> bool:
    """Whether `found` is an integer from 0 to `most`; true and false are none."""
    return type(found) is int and 0 <= found <= most


def is_shape(found: Any) -> bool:
    """Whether `found` is a list of sizes whose product no tensor exceeds."""
    if not isinstance(found, list) or not all(is_size(n) for n in found):
        return False
    count = 1
    for n in found:
        count *= n
        if count > MAX_NUMEL:
            return 0 in found
    return True


def are_fingerprints(sample: Any, support: Any) -> bool:
    """Whether both are 16 hexadecimal digits or None; a support needs a sample beside it."""
    given = [cell for cell in (sample, support) if cell is not None]
    if sample is None and support is not None:
        return False
    return all(isinstance(cell, str) and _FINGERPRINT.fullmatch(cell) for cell in given)


def _check_together(record: TensorRecord, what: str) -> None:
    """What no single column shows."""
    if record.nnz > record.numel:
        raise FormatError(f"{what}: {record.nnz} entries in {record.numel} elements")
    if record.mode == "set":
        allowed = [record.dtype]
    elif DTYPES[record.dtype].is_floating:
        allowed = [*WIDTHS, *(["float64"] if record.dtype == "float64" else [])]
    else:
        raise FormatError(f"{what}: add is not defined for {record.dtype}")
    if record.value_dtype not in allowed:
        raise FormatError(
            f"{what}: {record.mode} values of a {record.dtype} tensor cannot be "
            f"{record.value_dtype}"
        )
    if (record.seed is not None) != (record.coding == "seeded"):
        raise FormatError(f"{what}: coding {record.coding!r} with seed {record.seed}")
    for _, size, sha256 in record.streams().values():
        _check_digest(size, sha256, what)
    if record.order_bits is None and record.order_sha256 is not None:
        raise FormatError(f"{what}: a digest of an order stream that is not there")
    if not record.base_values and record.base_values_sha256 is not None:
        raise FormatError(f"{what}: a digest of base values that are not there")


def _check_digest(size: int, sha256: Any, what: str) -> None:
    fits = sha256 is None if not size else isinstance(sha256, str) and _DIGEST.fullmatch(sha256)
    if not fits:
        raise FormatError(f"{what}: {size} bytes cannot have the digest {_short(sha256)}")


def _short(found: Any) -> str:
    text = repr(found)
    return text if len(text) <= 60 else f"{text[:57]}..."
