"""Finding the weight files of a checkpoint: one file, the shards that an index names, or a directory
of torch.distributed.checkpoint (DCP)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deltakit.errors import FormatError, MissingFileError
from deltakit.formats import strict_json

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
DCP_METADATA, DCP_SUFFIX = ".metadata", ".distcp"
MAX_INDEX = 100_000_000  # bytes, as for a header
_DCP_SHARD = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Located:
    """The weight files of a checkpoint.

    directory: None for a lone file. files: in bytewise order of their names. weight_map: tensor
    name -> file name as the index has it; None where no index exists. index: the index file.
    is_dcp: whether it is a directory of torch.distributed.checkpoint, of which `files` tells the
    metadata alone; part: the keys that lead to the model in it, None where they were not given.
    """

    directory: Path | None
    files: tuple[Path, ...]
    weight_map: Mapping[str, str] | None = None
    index: Path | None = None
    is_dcp: bool = False
    part: str | None = None


def locate(path: str | Path) -> Located:
    """The files of the checkpoint at `path`: a .safetensors file, an index file, or a directory.

    In a directory `model.safetensors` comes first, as in transformers, then
    `model.safetensors.index.json`, then `.metadata` of torch.distributed.checkpoint, then the only
    other index, then the only other .safetensors file. A directory of the latter may be followed by
    # and the keys that lead to the model in it (see `split_part`). Raises MissingFileError when
    nothing is there and FormatError when it is not clear which file is meant or when an index is
    broken.
    """
    root, part = split_part(path)
    if part is not None:
        return _dcp(root, part)
    if root.is_dir():
        chosen = _choose(root)
        if chosen.name == DCP_METADATA:
            return _dcp(root, part)
        return _from_index(chosen) if chosen.name.endswith(".json") else Located(root, (chosen,))
    if not root.exists():
        raise MissingFileError(_missing(str(path)))
    if root.name.endswith(INDEX_SUFFIX):
        return _from_index(root)
    return Located(None, (root,))


def split_part(path: str | Path) -> tuple[Path, str | None]:
    """A path and what stands behind the # in it: `step-100#app.model` names the tensors under
    "app.model" of the directory `step-100`. None where there is no #, or where it belongs to the name
    of a file that exists."""
    folder, mark, part = str(path).rpartition("#")
    if not mark or Path(path).exists() or not Path(folder).is_dir():
        return Path(path), None
    return Path(folder), part


def _dcp(root: Path, part: str | None) -> Located:
    metadata = root / DCP_METADATA
    if not metadata.is_file():
        raise MissingFileError(
            f"{root} holds no {DCP_METADATA}, so it is no directory of torch.distributed.checkpoint"
        )
    return Located(root, (metadata,), is_dcp=True, part=part)


def _missing(path: str) -> str:
    if _HUB_ID.fullmatch(path) and not path.startswith((".", "/")):
        return f"{path} does not exist; if it is a model on the Hub, write hf://{path}"
    return f"{path} does not exist"


def _choose(root: Path) -> Path:
    for name in (f"model{SUFFIX}", f"model{INDEX_SUFFIX}", DCP_METADATA):
        if (root / name).is_file():
            return root / name
    for suffix in (INDEX_SUFFIX, SUFFIX):
        found = sorted(p for p in root.glob(f"*{suffix}") if p.is_file())
        if len(found) == 1:
            return found[0]
        if found and all(_DCP_SHARD.fullmatch(p.name) for p in found):
            raise FormatError(
                f"{root} holds the shards of each rank ({found[0].name}, ...), as "
                "HuggingFaceStorageWriter of torch writes them; consolidate them first (its option "
                "enable_consolidation=True does), or save with torch.distributed.checkpoint.save alone"
            )
        if found:
            names = ", ".join(p.name for p in found[:5])
            raise FormatError(
                f"{root} holds {len(found)} *{suffix} files ({names}) and no model{SUFFIX}; "
                "give one of the files"
            )
    ranks = sorted(p.name for p in root.glob(f"__*_*{DCP_SUFFIX}"))
    if ranks:
        raise MissingFileError(
            f"{root} holds {ranks[0]} but no {DCP_METADATA}, which torch.distributed.checkpoint.save "
            "writes last; it did not end, or the ranks saved apart (use_collectives=False)"
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
