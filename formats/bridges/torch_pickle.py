"""Files of torch.save, read without running what they say.

Such a file (.pt, .bin) is a zip archive around a pickle, and a pickle is a program. It is looked
into opcode by opcode, and read by torch's restricted unpickler with an allow-list, never otherwise.
torch is imported only to read; 2.6 is the first version whose restricted unpickler holds
(CVE-2025-32434) and takes stand-ins for classes.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltakit.dtypes import DTYPES, Array
from deltakit.errors import ConfigError, FormatError

_PEEKED = 2**16  # bytes of a pickle that recognition looks at
_OLDEST_TORCH = (2, 6)
# Whatever torch runs into where a pickle does not say what torch.save writes.
_DAMAGE: tuple[type[Exception], ...] = (
    *(pickle.UnpicklingError, RuntimeError, LookupError, ValueError, TypeError, OSError),
    *(AttributeError, AssertionError, EOFError, ArithmeticError, MemoryError, struct.error),
)
_GLOBAL = re.compile(r"GLOBAL:? (?:GLOBAL )?([\w.]+)")


@dataclass(frozen=True, slots=True)
class Peek:
    """What the beginning of a pickle mentions: its opcodes in order, the strings it holds, and the
    classes and functions that it asks for ("torch.FloatStorage")."""

    opcodes: tuple[str, ...]
    strings: tuple[str, ...]
    wanted: tuple[str, ...]


def peek(path: Path) -> Peek | None:
    """A look at the first 64 kB of the pickle in a file of torch.save, nothing being run; None for
    any other file."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_pickle_in(archive)) as record:
            data = record.read(_PEEKED)
    except (OSError, ValueError, RuntimeError, FormatError, zipfile.BadZipFile):
        return None
    opcodes: list[str] = []
    strings: list[str] = []
    wanted: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            opcodes.append(opcode.name)
            if opcode.name == "GLOBAL":
                wanted.append(str(argument).replace(" ", "."))
            elif isinstance(argument, str):
                strings.append(argument)
    except ValueError:
        pass  # the pickle goes on behind what was read, or is broken, which reading will tell
    return Peek(tuple(opcodes), tuple(strings), tuple(wanted))


def read(path: Path, stand_ins: Mapping[str, Any] | None = None) -> Any:
    """What torch.save wrote: tensors (mapped from the file) in plain containers.

    stand_ins: full name of a class or function that the file may ask for -> what to use instead.
    Raises FormatError, in one line, for what is no such file, is damaged, is compressed (so that
    its size is not bounded by the file's), or asks for anything else; ConfigError without torch.
    """
    torch = _torch(path)
    _check_archive(path)
    allowed = [(target, name) for name, target in (stand_ins or {}).items()]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except _DAMAGE as error:
        asked = _GLOBAL.search(str(error))
        if asked:
            raise _refused(path, asked[1]) from None
        reason = str(error).strip().partition("\n")[0][:200]
        raise FormatError(f"{path} cannot be read as a file of torch.save: {reason}") from None


def array(what: str, tensor: Any) -> Array:
    """A tensor that `read` gave, as a NumPy array of the same shape and dtype (a view).

    what: the tensor's name and place, for messages. Raises FormatError for what is no plain dense
    tensor, for a dtype that safetensors lacks, and for a shape larger than the data behind it.
    """
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise FormatError(f"{what}: expected a tensor, found {type(tensor).__name__}")
    kind = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if kind is None or not plain or tensor.is_quantized:
        raise FormatError(
            f"{what}: a tensor of {tensor.dtype}, {tensor.layout} on {tensor.device} cannot be "
            "read; expected a dense one"
        )
    if tensor.numel() * kind.itemsize > tensor.untyped_storage().nbytes():
        raise FormatError(
            f"{what}: shape {list(tensor.shape)} needs more than the "
            f"{tensor.untyped_storage().nbytes()} bytes that the file holds for it"
        )
    if kind.numpy == np.bool_:
        return np.asarray(tensor.detach().numpy())
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[kind.itemsize]
    return np.asarray(tensor.detach().contiguous().view(words).numpy().view(kind.numpy))


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise ConfigError(f"reading {path} needs torch; install deltakit-sparse[train]") from None
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < _OLDEST_TORCH:
        raise ConfigError(
            f"reading {path} needs torch 2.6 or newer, which reads pickles safely; found "
            f"{torch.__version__}"
        )
    return torch


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            name = _pickle_in(archive)
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise FormatError(
                        f"{path}: record {record.filename!r} is compressed, which torch.save "
                        "never does; save the file again"
                    )
            # The one class that torch allows and that allocates by a mere number.
            if b"\nbytearray\n" in archive.read(name):
                raise _refused(path, "builtins.bytearray")
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            f"{path} is no file of torch.save as of torch 1.6, or it is truncated: {error}"
        ) from None


def _pickle_in(archive: zipfile.ZipFile) -> str:
    found = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    if len(found) != 1:
        raise FormatError(f"{archive.filename} is no file of torch.save: it holds no data.pkl")
    return found[0]


def _refused(path: Path, name: str) -> FormatError:
    return FormatError(
        f"{path} asks for {name}, which deltakit does not run; nothing of it was run. Do not open "
        "this file with torch.load(weights_only=False)"
    )
