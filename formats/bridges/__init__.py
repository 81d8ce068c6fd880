"""Bridges to the formats of others: one file each, recognised by content, read safely."""

from __future__ import annotations

import os
from pathlib import Path

from deltakit.errors import FormatError, MissingFileError
from deltakit.formats.bridges import adapter_modules as adapter_modules
from deltakit.formats.bridges import coo_safetensors as coo_safetensors
from deltakit.formats.bridges import id3_toolkit as id3_toolkit
from deltakit.formats.bridges import lt_sft as lt_sft
from deltakit.formats.bridges import peft_lora as peft_lora
from deltakit.formats.bridges import peft_modules as peft_modules
from deltakit.formats.bridges import peft_shira as peft_shira
from deltakit.formats.bridges import peft_supertuning as peft_supertuning
from deltakit.formats.bridges import random_masking as random_masking
from deltakit.formats.bridges import rosa as rosa
from deltakit.formats.bridges import sdelta as sdelta
from deltakit.formats.bridges import spiel as spiel
from deltakit.formats.bridges import vllm_patch as vllm_patch
from deltakit.formats.bridges import weightscope as weightscope
from deltakit.formats.bridges.bridge import BRIDGES as BRIDGES
from deltakit.formats.bridges.bridge import Bridge as Bridge
from deltakit.formats.bridges.bridge import Options as Options
from deltakit.formats.bridges.bridge import Reading as Reading


def recognise(path: str | os.PathLike[str]) -> tuple[str, str]:
    """The format of what stands at `path`, by content, and one line about it.

    Raises MissingFileError where nothing is there and FormatError where no format fits or several
    do.
    """
    where = Path(path)
    if not where.exists():
        raise MissingFileError(f"{where} does not exist")
    told = {record.name: record.target().recognise(where) for record in BRIDGES}
    found = [(name, what) for name, what in told.items() if what is not None]
    if len(found) == 1:
        return found[0]
    if found:
        both = " and ".join(f"{name} ({what})" for name, what in found)
        raise FormatError(f"{where} could be {both}; say which (--from)")
    raise FormatError(f"{where} is of no known format; known: {', '.join(BRIDGES.names())}")
