"""What a bridge to another format is, what it reads, and the registry of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from deltakit.delta import Mode, SparseDelta
from deltakit.errors import ConfigError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.registry import Registry

Form = Literal["adapter", "weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a conversion may be told beside the base; a bridge takes what concerns it.

    budget: entries to keep of a dense change, a count or a share of the base ("100k", "0.1%").
    density: the same as a share of the changed tensors' weights, above 0 to 1.
    form: what a low-rank adapter becomes, an adapter's tensors or entries of the base's weights.
    mode: what values are, differences or new weights, where a file does not say.
    prefix: what the live model has before the checkpoint's names, for formats of live names.
    lossy: leave out what cannot be converted, with a note, where it would be refused.
    progress: called with (tensors done, tensors in all) by what takes long.
    """

    budget: int | str | None = None
    density: float | None = None
    form: Form | None = None
    mode: Mode | None = None
    prefix: str = ""
    lossy: bool = False
    progress: Callable[[int, int], None] | None = None


@dataclass(frozen=True, slots=True)
class Energy:
    """Sums of squares of a tensor's change, before and after it was made sparse."""

    whole: float
    kept: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What a bridge made of a foreign file.

    delta: in checkpoint coordinates; `deltakit.conversion` adds the base's identity and the
    provenance. notes: what was lost or assumed, one line each. energy: by tensor, of changes that
    were made sparse.
    """

    delta: SparseDelta
    notes: tuple[str, ...] = ()
    energy: Mapping[str, Energy] = field(default_factory=dict)


class Bridge:
    """One foreign format. A bridge that only reads leaves `write` as it is, and the other way.

    writes: the mode in which `write` takes every tensor, None for any; the delta is brought into
    it beforehand, which needs the base. holds: what deltas `write` takes, of the base's weights, of
    adapters, or both. sparsifies: whether `read` takes a budget or a density.
    """

    name: ClassVar[str] = ""  # as registered
    writes: ClassVar[Mode | None] = None
    holds: ClassVar[Literal["weights", "adapters", "both"]] = "weights"
    sparsifies: ClassVar[bool] = False

    def recognise(self, path: Path) -> str | None:
        """What stands at `path` ("PEFT SHiRA adapter, 12 tensors") where it is of this format,
        judged by its content; None for anything else. Cheap, without torch, and never raises."""
        return None

    def read(self, path: Path, *, base: Checkpoint | None, options: Options) -> Reading:
        """The delta at `path`.

        Raises FormatError for a file that is not what it should be, ConfigError where the base is
        needed and not given, CoordinateError where the base lacks a tensor.
        """
        raise ConfigError(f"format {self.name} can only be written")

    def write(
        self, delta: SparseDelta, path: Path, *, base: Checkpoint | None, options: Options
    ) -> tuple[str, ...]:
        """Write `delta` to `path`, atomically, and tell what was lost or assumed, a line each.

        Raises ConfigError where the format cannot hold the delta.
        """
        raise ConfigError(f"format {self.name} can only be read")


BRIDGES: Registry[type[Bridge]] = Registry("format")


def needed(base: Checkpoint | None, why: str) -> Checkpoint:
    """The base; ConfigError where none was given, `why` telling what it is needed for."""
    if base is None:
        raise ConfigError(f"{why}; give the base (--base)")
    return base
