"""The native format as one of the formats, so that a conversion may begin or end with it."""

from __future__ import annotations

from pathlib import Path

from deltakit.delta import SparseDelta
from deltakit.errors import DeltakitError
from deltakit.formats.bridges.bridge import BRIDGES, Bridge, Options, Reading
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.sdelta import SdeltaFile, is_sdelta, load, save


@BRIDGES.register("sdelta", "deltakit's own files", "formats/SPEC.md")
class Sdelta(Bridge):
    """`.sdelta` files, which hold everything that a delta is."""

    name = "sdelta"
    holds = "both"

    def recognise(self, path: Path) -> str | None:
        try:
            if not is_sdelta(path):
                return None
            with SdeltaFile(path) as file:
                return f"deltakit delta, {len(file.tensors)} tensors"
        except DeltakitError:
            return "deltakit delta, damaged"  # reading tells where
        except OSError:
            return None

    def read(self, path: Path, *, base: Checkpoint | None, options: Options) -> Reading:
        return Reading(load(path, progress=options.progress))

    def write(
        self, delta: SparseDelta, path: Path, *, base: Checkpoint | None, options: Options
    ) -> tuple[str, ...]:
        save(delta, path)
        return ()
