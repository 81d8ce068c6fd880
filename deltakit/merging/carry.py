"""What a merged folder takes over from its base beside the weights: tokenizer, configuration, ..."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltakit.dtypes import DTYPES
from deltakit.errors import FormatError
from deltakit.formats.atomic import placing
from deltakit.formats.checkpoint import Checkpoint

LARGEST = 256 * 2**20  # bytes; the largest tokenizers in use have some 50 MB
_WEIGHTS = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt"),
    *(".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".tflite", ".npz", ".pkl", ".sdelta"),
    ".distcp",
)


@dataclass(frozen=True, slots=True)
class Carried:
    """A file to be copied: its path, the name it keeps in the merged folder, its size in bytes."""

    source: Path
    name: str
    size: int


def carried_files(base: Checkpoint) -> tuple[list[Carried], list[str]]:
    """The files of the base's folder that go along, in bytewise order, and notes on the others.

    Everything goes along except weights in any format, files beyond 256 MB, hidden folders, and
    folders called `checkpoint-*`. Small .safetensors files in sub-folders (the modules of
    sentence-transformers) do go along.
    """
    if base.directory is None:
        return [], []
    kept, left = [], []
    for path in _walk(base.directory):
        name = path.relative_to(base.directory).as_posix()
        if path in base.files or path == base.index:
            continue
        nested_module = "/" in name and path.suffix == ".safetensors"
        size = path.stat().st_size
        if size > LARGEST or (path.name.endswith(_WEIGHTS) and not nested_module):
            left.append(name)
        else:
            kept.append(Carried(path, name, size))
    if not left:
        return kept, []
    listed = ", ".join(left[:4]) + (", ..." if len(left) > 4 else "")
    return kept, [f"{len(left)} other weight files of the base are left out: {listed}"]


def copy_carried(files: Iterable[Carried], folder: Path) -> None:
    """Copy the files into `folder` under the names they keep, as ordinary writable files."""
    for file in files:
        target = folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with placing(target) as temporary:
            shutil.copyfile(file.source, temporary)


def merged_config(
    base: Checkpoint, changes: Mapping[str, Any], dtype: str | None
) -> tuple[bytes | None, list[str]]:
    """The bytes of config.json with `changes`, or None where it stays as it is, and notes.

    dtype: the dtype that the floating tensors were converted to, or None. It replaces what the
    configuration says under "dtype" or "torch_dtype", in parts of it too.
    """
    config = base.config()
    if config is None:
        if not changes:
            return None, []
        keys = ", ".join(sorted(changes))
        return None, [f"the deltas change the configuration ({keys}), but {_no_config(base)}"]
    new = _with_dtype({**config, **changes}, dtype)
    if list(config) == sorted(config):  # as transformers writes it, new keys included
        new = {key: new[key] for key in sorted(new)}
    if new == config:
        return None, []
    plain = base.directory is not None and (base.directory / "config.json").read_bytes().isascii()
    try:  # escapes where the base has them, so that what transformers wrote comes back as it was
        text = json.dumps(new, indent=2, ensure_ascii=plain, allow_nan=False)
    except ValueError as error:
        raise FormatError(f"config.json cannot be written: {error}") from None
    return text.encode() + b"\n", []


def _no_config(base: Checkpoint) -> str:
    if base.directory is None:
        return "a lone file has none; merge the base's folder instead"
    return f"{base.directory} has no config.json; write them where they belong"


def _with_dtype(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    if dtype is None:
        return config
    made: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and value in DTYPES:
            made[key] = dtype
        else:
            made[key] = _with_dtype(value, dtype) if isinstance(value, dict) else value
    return made


def _walk(folder: Path) -> Iterator[Path]:
    for current, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "checkpoint-")))
        for name in sorted(files, key=str.encode):
            path = Path(current, name)
            if path.is_file():
                yield path
