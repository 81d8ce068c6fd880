"""The folders that PEFT saves adapters in, told apart and read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltakit.delta import BaseIdentity
from deltakit.dtypes import Array, DType
from deltakit.errors import DeltakitError, FormatError
from deltakit.formats import strict_json
from deltakit.formats.bridges.foreign_tensors import StateDict, mentioned
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.safetensors_file import SafetensorsFile

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"  # of PEFT before 0.7, and of its forks
PREFIX = "base_model.model."  # before the live name, in every key
MAX_CONFIG = 10_000_000  # bytes

# A key without PREFIX -> the module and the rest, for tensors of an adapter; None for the others.
Split = Callable[[str], tuple[str, str] | None]


@dataclass(frozen=True)
class Adapter:
    """A saved adapter: its adapter_config.json and its tensors, read when asked for.

    modules: live name of a module -> the last part of the key ("shira_weight") -> the key.
    saved: live name -> key, of the tensors that were saved whole (`modules_to_save`, biases).
    """

    folder: Path
    config: Mapping[str, Any]
    file: SafetensorsFile | StateDict
    modules: Mapping[str, Mapping[str, str]]
    saved: Mapping[str, str]

    def array(self, key: str) -> Array:
        """The tensor under a key, in its own dtype and shape."""
        info = self.file.tensors[key]
        return self.file.read(key).view(info.kind.numpy).reshape(info.shape)

    def identity(self) -> BaseIdentity:
        """The base as the adapter names it, its values unknown."""
        named = (self.config.get(key) for key in ("base_model_name_or_path", "revision"))
        model_id, revision = (name if isinstance(name, str) and name else None for name in named)
        return BaseIdentity(model_id=model_id, revision=revision)


def adapter_config(path: Path) -> Mapping[str, Any] | None:
    """The adapter_config.json of the adapter at `path` (its folder, or a file in it), or None
    where there is no readable one. Never raises."""
    folder = path if path.is_dir() else path.parent
    file = folder / CONFIG
    try:
        if path.is_file() and not path.name.startswith("adapter_"):
            return None
        if not file.is_file() or file.stat().st_size > MAX_CONFIG:
            return None
        content = strict_json.loads(file.read_bytes(), str(file))
    except (OSError, DeltakitError):
        return None
    return content if isinstance(content, dict) else None


def is_adapter(path: Path, peft_type: str, marks: Iterable[str], what: str) -> str | None:
    """`what` with the number of adapted modules, where `path` is an adapter of this type."""
    config = adapter_config(path)
    if config is None or config.get("peft_type") != peft_type:
        return None
    folder = path if path.is_dir() else path.parent
    if _is_pickled(folder):
        endings = tuple(f".{mark}" for mark in marks)
        return what if any(n.endswith(endings) for n in mentioned(folder / PICKLED)) else None
    try:
        return f"{what}, {len(open_adapter(path, marks).modules)} modules"
    except (OSError, DeltakitError):
        return None


def open_adapter(path: Path, marks: Iterable[str]) -> Adapter:
    """The adapter at `path`, its tensors told apart: those whose keys end in one of `marks`, the
    rest as saved whole. Raises FormatError and MissingFileError."""
    endings = tuple(marks)

    def split(live: str) -> tuple[str, str] | None:
        mark = next((m for m in endings if live.endswith(f".{m}")), None)
        return None if mark is None else (live[: -len(mark) - 1], mark)

    return split_adapter(path, split, " or ".join(endings))


def split_adapter(path: Path, split: Split, what: str) -> Adapter:
    """The adapter at `path`, its tensors told apart by `split`; one without any of `what` is
    refused. Raises FormatError and MissingFileError."""
    folder = path if path.is_dir() else path.parent
    config = adapter_config(path)
    if config is None:
        raise FormatError(f"{folder} holds no readable {CONFIG}")
    pickled = _is_pickled(folder)
    file = StateDict(folder / PICKLED) if pickled else SafetensorsFile(folder / WEIGHTS)
    modules: dict[str, dict[str, str]] = {}
    saved = {}
    for key in file.tensors:
        live = key.removeprefix(PREFIX)
        parts = split(live)
        if parts is None:
            if ".original_module." not in live:  # a head before training, saved with all biases
                saved[_unwrapped(live)] = key
        elif modules.setdefault(parts[0], {}).setdefault(parts[1], key) != key:
            raise FormatError(f"{file.path}: {live!r} stands there with and without {PREFIX!r}")
    if not modules:
        raise FormatError(f"{file.path} holds no {what}")
    return Adapter(folder, config, file, modules, saved)


def _is_pickled(folder: Path) -> bool:
    return (folder / PICKLED).is_file() and not (folder / WEIGHTS).is_file()


def _unwrapped(live: str) -> str:
    return live.replace(".base_layer.", ".").replace(".modules_to_save.", ".")


def saved_whole(
    adapter: Adapter, names: Mapping[str, str], base: Checkpoint | None
) -> tuple[dict[str, Array], list[str]]:
    """The extras of an adapter by checkpoint name, and notes; what equals the base is left out.

    PEFT loads them into the base's dtype, so that is the dtype they get.
    """
    extras, notes = {}, []
    for live, key in adapter.saved.items():
        name, array = names[live], adapter.array(key)
        info = None if base is None else base.tensors.get(name)
        if base is None or info is None:
            extras[name] = array
            continue
        if array.dtype != info.kind.numpy:
            notes.append(f"extra {name!r} is {array.dtype} and becomes {info.dtype}, as the base")
            array = array.astype(info.kind.numpy)
        if array.shape != info.shape or not _same_bits(array, base.read(name)):
            extras[name] = array
    same = len(adapter.saved) - len(extras)
    if same:
        notes.append(f"{same} tensors were saved whole and equal the base's; they are left out")
    return extras, notes


def _same_bits(array: Array, words: Array) -> bool:
    return np.array_equal(array.reshape(-1).view(words.dtype), words)


def weight_of(module: str, name: str, base: Checkpoint) -> tuple[tuple[int, ...], DType]:
    """Shape and dtype of an adapted weight in the base; FormatError where the tensor is no weight
    of a linear layer."""
    info = base.info(name)
    if len(info.shape) != 2 or not info.kind.is_floating:
        raise FormatError(
            f"module {module!r}: tensor {name!r} of {base.path} is {info.dtype} "
            f"{list(info.shape)}, expected the floats of a linear layer [out, in]"
        )
    return info.shape, info.kind
