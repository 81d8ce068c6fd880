"""Finding the weight files of a checkpoint: one file, or the shards that an index names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deltakit.errors import FormatError, MissingFileError
from deltakit.formats import strict_json

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
MAX_INDEX = 100_000_000  # bytes, as for a header
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Located:
    """The weight files of a checkpoint.

    directory: None for a lone file. files: in bytewise order of their names. weight_map: tensor
    name -> file name as the index has it; None where no index exists. index: the index file.
    """

    directory: Path | None
    files: tuple[Path, ...]
    weight_map: Mapping[str, str] | None = None
    index: Path | None = None


def locate(path: str | Path) -> Located:
    """The files of the checkpoint at `path`: a .safetensors file, an index file, or a directory.

    In a directory `model.safetensors` comes first, as in transformers, then
    `model.safetensors.index.json`, then the only other index, then the only other .safetensors
    file. Raises MissingFileError when nothing is there and FormatError when it is not clear which
    file is meant or when an index is broken.
    """
    root = Path(path)
    if root.is_dir():
        chosen = _choose(root)
        return _from_index(chosen) if chosen.name.endswith(".json") else Located(root, (chosen,))
    if not root.exists():
        raise MissingFileError(_missing(str(path)))
    if root.name.endswith(INDEX_SUFFIX):
        return _from_index(root)
    return Located(None, (root,))


def _missing(path: str) -> str:
    if _HUB_ID.fullmatch(path) and not path.startswith((".", "/")):
        return f"{path} does not exist; if it is a model on the Hub, write hf://{path}"
    return f"{path} does not exist"


def _choose(root: Path) -> Path:
    for name in (f"model{SUFFIX}", f"model{INDEX_SUFFIX}"):
        if (root / name).is_file():
            return root / name
    for suffix in (INDEX_SUFFIX, SUFFIX):
        found = sorted(p for p in root.glob(f"*{suffix}") if p.is_file())
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(p.name for p in found[:5])
            raise FormatError(
                f"{root} holds {len(found)} *{suffix} files ({names}) and no model{SUFFIX}; "
                "give one of the files"
            )
    pickled = sorted(p.name for p in root.glob("*.bin")) + sorted(p.name for p in root.glob("*.pt"))
    if pickled:
        raise MissingFileError(
            f"{root} holds {pickled[0]} but no {SUFFIX} file; deltakit never unpickles, convert it "
            "to safetensors first (model.save_pretrained(DIR) of transformers does)"
        )
    raise MissingFileError(f"{root} holds no {SUFFIX} file")


def read_index(index: Path) -> Mapping[str, str]:
    """The weight_map of an index file: tensor name -> plain file name; FormatError for others."""
    if index.stat().st_size > MAX_INDEX:
        raise FormatError(f"{index}: an index of {index.stat().st_size} bytes is not acceptable")
    content = strict_json.loads(index.read_bytes(), str(index))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index} has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain(name):
            raise FormatError(
                f"{index}: tensor {tensor!r} is mapped to {name!r}, which is no plain name of a "
                f"{SUFFIX} file in the same folder"
            )
    return weight_map


def _from_index(index: Path) -> Located:
    weight_map = read_index(index)
    files = tuple(index.parent / name for name in sorted(set(weight_map.values()), key=str.encode))
    for file in files:
        if not file.is_file():
            raise MissingFileError(f"{index} names {file.name}, which is missing")
    return Located(index.parent, files, weight_map, index)


def _is_plain(name: str) -> bool:
    return name.endswith(SUFFIX) and not any(c in name for c in "/\\:\0") and len(name) <= 255
