"""Converting between deltakit's files and those of others, through the bridges of each format."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltakit.delta import BaseIdentity, Mode, SparseDelta
from deltakit.errors import ConfigError, DeltakitError, OutputError
from deltakit.formats.atomic import refuse_existing
from deltakit.formats.bridges import BRIDGES, Bridge, Options, Reading, recognise
from deltakit.formats.bridges.bridge import Energy, Form, needed
from deltakit.formats.checkpoint import Checkpoint
from deltakit.hub.locate import local_source
from deltakit.identity import check_base, identify
from deltakit.rebasing import rebase

NATIVE = "sdelta"


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What was read and written.

    found: one line about the input, by its content. entries, extra_weights: of the delta that was
    read; notes tell where a writer left some out, and what else was lost or assumed. energy: by
    tensor, of changes that were made sparse.
    """

    source: Path
    output: Path
    from_format: str
    to_format: str
    found: str
    entries: int
    extra_weights: int
    notes: tuple[str, ...]
    energy: Mapping[str, Energy]

    @property
    def retained(self) -> float | None:
        """Share of the whole change's energy (sum of squares) that stayed; None where nothing was
        made sparse, and for a change of nothing."""
        whole = math.fsum(energy.whole for energy in self.energy.values())
        return math.fsum(e.kept for e in self.energy.values()) / whole if whole else None

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain JSON; the energy as each tensor's share that stayed."""
        return {
            "source": str(self.source),
            "output": str(self.output),
            "from": self.from_format,
            "to": self.to_format,
            "found": self.found,
            "entries": self.entries,
            "extra_weights": self.extra_weights,
            "notes": list(self.notes),
            "retained_energy": self.retained,
            "retained_energy_by_tensor": {
                name: energy.kept / energy.whole if energy.whole else None
                for name, energy in self.energy.items()
            },
        }


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    from_format: str | None = None,
    to_format: str | None = None,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    budget: int | str | None = None,
    density: float | None = None,
    form: Form | None = None,
    mode: Mode | None = None,
    prefix: str = "",
    lossy: bool = False,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Convert the delta or adapter at `source` and write it to `out`.

    from_format: by default told by the content. to_format: by default "sdelta", unless `source`
    is one. base: the checkpoint; many formats lack shapes and need it, and its identity is recorded
    or, where the source has it recorded, checked. budget, density: how many entries stay of a
    dense change (LoRA). form: whether a LoRA adapter stays an adapter or becomes entries of the
    base's weights; by default weights where a budget or density is given. mode, prefix, lossy: see
    `deltakit.formats.bridges.bridge.Options`. force: replace an output that exists; a folder only
    where it is of a known format. progress: called with (tensors done, tensors in all), or entries
    for .sdelta files.

    Raises FormatError for input that is of no known format or broken, ConfigError where something
    must be said that was not, CoordinateError and BaseMismatchError for another base,
    OutputExistsError for an output that is there.
    """
    where, target = local_source(source), Path(out)
    options = Options(
        budget=budget,
        density=density,
        form=form,
        mode=mode,
        prefix=prefix,
        lossy=lossy,
        progress=progress,
    )
    reader, found = _reader(where, from_format)
    writer = BRIDGES[_target_format(reader.name, to_format)]()
    _check_options(reader, options)
    _check_output(where, target, force)
    checkpoint = base if isinstance(base, Checkpoint) or base is None else Checkpoint(Path(base))
    reading = reader.read(where, base=checkpoint, options=options)
    delta = _with_identity(reading, checkpoint, reader)
    _check_kind(delta, writer)
    ready = _in_mode(delta, writer, checkpoint)
    lost = writer.write(ready, target, base=checkpoint, options=options)
    return ConversionReport(
        source=where,
        output=target,
        from_format=reader.name,
        to_format=writer.name,
        found=found,
        entries=ready.nnz,
        extra_weights=ready.extra_weights,
        notes=(*reading.notes, *lost),
        energy=reading.energy,
    )


def _reader(source: Path, from_format: str | None) -> tuple[Bridge, str]:
    if from_format is None:
        name, found = recognise(source)
        return BRIDGES[name](), found
    reader = BRIDGES[from_format]()
    return reader, reader.recognise(source) or f"taken as {from_format}, as asked"


def _target_format(from_format: str, to_format: str | None) -> str:
    chosen = to_format or (NATIVE if from_format != NATIVE else None)
    if chosen is None:
        writable = [r.name for r in BRIDGES if r.target.write is not Bridge.write]
        writable.remove(NATIVE)
        raise ConfigError(
            f"an sdelta can become {', '.join(writable)}; say which (--to), or change what it "
            "holds with truncate, stack or rebase"
        )
    return chosen


def _check_options(reader: Bridge, options: Options) -> None:
    asked = options.budget is not None or options.density is not None
    if asked and not reader.sparsifies:
        raise ConfigError(
            f"{reader.name} is sparse as it is; convert it whole, then deltakit truncate the result"
        )
    if options.form is not None and not reader.sparsifies:
        raise ConfigError(f"{reader.name} has one form only; --as is for low-rank adapters")


def _check_kind(delta: SparseDelta, writer: Bridge) -> None:
    if delta.adapter is None and writer.holds == "adapters":
        raise ConfigError(
            f"{writer.name} holds adapters and the delta holds entries of the base's weights, which "
            "PEFT has as peft-shira or peft-supertuning"
        )
    if delta.adapter is not None and writer.holds == "weights":
        raise ConfigError(
            f"{writer.name} holds entries of the base's weights and the delta is one of an adapter "
            f"({delta.adapter.kind}); --to peft-adapter writes it, deltakit merge folds it"
        )


def _check_output(source: Path, target: Path, force: bool) -> None:
    refuse_existing(target, force)
    if not target.exists():
        return
    if source.exists() and target.samefile(source):
        raise OutputError(f"{target} is the input; give another output")
    if target.is_dir():
        try:
            recognise(target)
        except DeltakitError as error:
            raise OutputError(f"{target} is not replaced: {error}") from None


def _with_identity(reading: Reading, base: Checkpoint | None, reader: Bridge) -> SparseDelta:
    """The delta with its base's identity, recorded or checked, and its conversion as lineage."""
    delta = reading.delta
    named = delta.base or BaseIdentity()
    if base is not None and not named.tensors:
        known = _identity(delta, base)
        model_id, revision = known.model_id or named.model_id, known.revision or named.revision
        delta = replace(delta, base=replace(known, model_id=model_id, revision=revision))
    elif delta.base == BaseIdentity():
        delta = replace(delta, base=None)
    if base is not None:
        check_base(delta, base)
    if reader.name == NATIVE:
        return delta
    step: dict[str, Any] = {"operation": "convert", "from": reader.name}
    if reading.notes:
        step["notes"] = list(reading.notes)
    lineage = [*delta.provenance.get("lineage", []), step]
    return replace(delta, provenance={**delta.provenance, "lineage": lineage})


def _identity(delta: SparseDelta, base: Checkpoint) -> BaseIdentity:
    if delta.adapter is not None:
        modules = {delta.adapter.split(name)[0] for name in delta.tensors}
        return identify(base, {f"{module}.weight": None for module in modules})
    touched = {name: tensor.indices for name, tensor in delta.tensors.items()}
    trained = {name: tensor.trained_dtype for name, tensor in delta.tensors.items()}
    return identify(base, touched, trained)


def _in_mode(delta: SparseDelta, writer: Bridge, base: Checkpoint | None) -> SparseDelta:
    """The delta with all tensors in the mode that the writer takes."""
    wanted = writer.writes
    other = [name for name, t in delta.tensors.items() if wanted is not None and t.mode != wanted]
    if wanted is None or not other:
        return delta
    have = "new weights" if wanted == "add" else "differences"
    why = f"{writer.name} is written from mode {wanted} and tensor {other[0]!r} holds {have}"
    ready = rebase(delta, needed(base, why), wanted)
    stayed = [name for name, tensor in ready.tensors.items() if tensor.mode != wanted]
    if stayed:
        raise ConfigError(
            f"tensor {stayed[0]!r} has weights that no difference gives back bit for bit, so "
            f"{writer.name} cannot hold it"
        )
    return ready
