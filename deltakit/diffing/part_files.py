"""Reading the parts of a diff, however many there are, in tensor order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from deltakit.delta import in_tensor_order
from deltakit.diffing.fill import Known
from deltakit.dtypes import Array
from deltakit.formats.sdelta import SdeltaFile

if TYPE_CHECKING:
    from typing_extensions import Self

_OPEN = 64  # parts that are open at a time; each keeps a handle, and systems give few


def part_record(file: SdeltaFile) -> Mapping[str, Any]:
    """What the provenance of a part tells about it; empty for files that are none."""
    found = file.provenance.get("part")
    return found if isinstance(found, dict) else {}


class PartFiles:
    """Parts whose tensors and extras are read one by one; a context manager.

    differing: elements that differ, of all parts.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._open: OrderedDict[Path, SdeltaFile] = OrderedDict()
        self.differing = 0
        tensors: dict[str, Path] = {}
        self._extras: dict[str, Path] = {}
        for path in paths:
            with SdeltaFile(path) as file:
                self.differing += int(part_record(file)["differing"])
                tensors |= dict.fromkeys(file.tensors, path)
                self._extras |= dict.fromkeys(file.extras, path)
        self._tensors: dict[str, Path] = in_tensor_order(tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def tensors(self) -> Iterator[Known]:
        """All tensors with the fingerprints of their base, in tensor order."""
        for name, path in self._tensors.items():
            file = self._file(path)
            assert file.base is not None
            yield file.tensor(name), file.base.tensors[name]

    def extras(self) -> Iterator[tuple[str, Array]]:
        """Name and content of all extras."""
        for name, path in self._extras.items():
            yield name, self._file(path).extra(name)

    def _file(self, path: Path) -> SdeltaFile:
        """A part, opened unless it is open; the one that was not used for longest is closed."""
        if path not in self._open:
            if len(self._open) == _OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[path] = SdeltaFile(path)
        self._open.move_to_end(path)
        return self._open[path]
