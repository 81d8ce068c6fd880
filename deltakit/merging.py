"""Merging deltas into a checkpoint, exactly and in bounded memory, into a new file or folder.

Every entry becomes round(float32(base) + v) to the base's dtype, nearest even; all other bytes of
the body are those of the base. The rule for several deltas, weights and `set` entries stands in
`deltakit.arithmetic`, the default output name in `deltakit.naming`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltakit.budget import format_bytes
from deltakit.carry import Carried, carried_files, copy_carried, merged_config
from deltakit.errors import ConfigError, MissingFileError, OutputError
from deltakit.formats import rewrite
from deltakit.formats.atomic import replacing
from deltakit.formats.atomic_folder import replacing_folder
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.sdelta import is_sdelta
from deltakit.merge_files import Overflows, WeightFile, index_bytes, weight_files
from deltakit.merge_inputs import Given, read_inputs
from deltakit.merge_plan import Plan, plan_merge
from deltakit.naming import Output, check_output, output_for

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What a merge did, or would do with dry_run.

    output: the path written. is_folder: whether it is a folder. base, deltas, weights, dtype: as
    given. bytes: size of all output files. tensors: tensors with entries. entries: entries that
    change (the union of the supports). extras: names of whole tensors written. files: names of the
    files in the output. peak_memory: upper estimate in bytes. base_mismatch_allowed: whether other
    base values were let through. notes: what the user should know.
    """

    output: str
    is_folder: bool
    base: str
    deltas: tuple[str, ...]
    weights: tuple[float, ...]
    dtype: str | None
    bytes: int
    tensors: int
    entries: int
    extras: tuple[str, ...]
    files: tuple[str, ...]
    peak_memory: int
    base_mismatch_allowed: bool
    dry_run: bool
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class _Writing:
    """All that is to be written to one output."""

    weights: Sequence[WeightFile]
    carried: Sequence[Carried]
    small: dict[str, bytes]  # config.json and the index, where they are made here

    @property
    def sizes(self) -> dict[str, int]:
        sizes = {file.name: file.size for file in self.weights}
        sizes |= {file.name: file.size for file in self.carried}
        return sizes | {name: len(data) for name, data in self.small.items()}


def merge(
    base: str | Path | Checkpoint,
    deltas: Given | Sequence[Given],
    out: str | Path | None = None,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    allow_base_mismatch: bool = False,
    force: bool = False,
    dry_run: bool = False,
    head: int | str | Path | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge one or several deltas into a base and write a new checkpoint.

    base: a .safetensors file or a folder. deltas: SparseDelta objects or paths of .sdelta files,
    in order. out: a file or folder (see `deltakit.naming`); a folder takes over the base's shards
    one to one, its tokenizer and its configuration with the deltas' changes.
    weights: one factor per delta, 1 by default. dtype: None keeps the base's; "trained" casts the
    whole base to the dtype of training first and so reproduces the trained bits; "bfloat16" and
    others merge in the base's dtype and then convert all floating tensors.
    head: which delta's extras and configuration win where several differ, by position or path.
    progress: called with (bytes done, bytes in all).

    Every delta is checked before anything is written, and nothing partial is left behind. Raises
    BaseMismatchError for another base (unless allowed), CoordinateError for unknown tensors and
    other shapes, DeltaError for deltas that contradict each other, OutputExistsError for an output
    that exists (unless `force`) and OutputError where it cannot be written.
    """
    if not isinstance(base, Checkpoint):
        _refuse_delta(base)
    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint(base)
    inputs = read_inputs(deltas, weights)
    paths = [each.path for each in inputs if each.path is not None]
    output = output_for(checkpoint, paths, out, many=len(inputs) > 1)
    check_output(output, checkpoint, paths, force)
    plan = plan_merge(
        checkpoint, inputs, dtype=dtype, allow_base_mismatch=allow_base_mismatch, head=head
    )
    overflows = Overflows()
    writing = _prepare(plan, output, overflows)
    sizes = writing.sizes
    if not dry_run:
        _check_space(output.path, sum(sizes.values()))
        _write(writing, output, progress)
    return MergeReport(
        output=str(output.path),
        is_folder=output.is_folder,
        base=str(checkpoint.path),
        deltas=tuple(each.label for each in inputs),
        weights=tuple(each.weight for each in inputs),
        dtype=dtype,
        bytes=sum(sizes.values()),
        tensors=len(plan.touched),
        entries=plan.entries,
        extras=tuple(sorted(plan.extras, key=str.encode)),
        files=tuple(sizes),
        peak_memory=plan.peak_memory,
        base_mismatch_allowed=allow_base_mismatch,
        dry_run=dry_run,
        notes=tuple(plan.notes + overflows.notes()),
    )


def _refuse_delta(base: str | Path) -> None:
    if Path(base).is_file() and is_sdelta(base):
        raise ConfigError(f"{base} is a delta; the first argument of a merge is the base")


def _prepare(plan: Plan, output: Output, overflows: Overflows) -> _Writing:
    converted = plan.untouched if plan.dtype == "trained" else plan.dtype
    config, notes = merged_config(plan.base, plan.config, converted)
    if not output.is_folder:
        if plan.config and plan.base.directory is not None:
            notes = [f"{output.path} is a lone file, so configuration changes are not written"]
        plan.notes.extend(notes)
        return _Writing(weight_files(plan, overflows, output.path.name), [], {})
    files = weight_files(plan, overflows)
    index = index_bytes(plan, files)
    small = {} if index is None or plan.base.index is None else {plan.base.index.name: index}
    carried, more = carried_files(plan.base)
    if config is not None:
        small["config.json"] = config
        carried = [file for file in carried if file.name != "config.json"]
    plan.notes.extend(notes + more)
    return _Writing(files, carried, small)


def _check_space(path: Path, size: int) -> None:
    parent = path.absolute().parent
    if not parent.is_dir():
        raise MissingFileError(f"cannot write {path}: folder {parent} does not exist")
    free = shutil.disk_usage(parent).free
    if size > free:
        raise OutputError(
            f"{path} needs {format_bytes(size)}, {parent} has {format_bytes(free)} free"
        )


def _write(writing: _Writing, output: Output, progress: Progress | None) -> None:
    total, done = sum(file.size for file in writing.weights), 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    if not output.is_folder:
        (file,) = writing.weights
        with replacing(output.path) as temporary:
            rewrite.write(temporary, file.header, file.parts, advance)
        return
    with replacing_folder(output.path) as folder:
        copy_carried(list(writing.carried), folder)
        for name, data in writing.small.items():
            (folder / name).write_bytes(data)
        for file in writing.weights:
            rewrite.write(folder / file.name, file.header, file.parts, advance)
