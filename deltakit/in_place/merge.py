"""Merging deltas into a checkpoint where it stands, in time that does not follow its size.

The weights become, bit for bit, those that `deltakit.merge` writes to a new file. Before
the first of them changes, a journal beside the model holds its original bits (see
`deltakit.in_place.journal`); `revert` brings them back. A further merge starts from these original bits
with all deltas merged so far, so merging one after the other equals merging all at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltakit.adapters.refusal import refuse_adapters
from deltakit.delta import TensorDelta, in_tensor_order
from deltakit.dtypes import Array, dtype_of
from deltakit.errors import ConfigError, DeltakitError, OutputError
from deltakit.formats.checkpoint_files import locate
from deltakit.formats.safetensors_file import TensorInfo
from deltakit.formats.undo_folder import refuse_unfinished
from deltakit.in_place.journal import Journal, kept
from deltakit.in_place.journal_record import Original, Record, bits_before, check_bits, merged_bits
from deltakit.in_place.recovery import Progress, roll_back, settle
from deltakit.in_place.weights import OpenWeights
from deltakit.merging.arithmetic import merged_words, union_between
from deltakit.merging.carry import merged_config
from deltakit.merging.files import Overflows, count_overflows
from deltakit.merging.inputs import Given, chosen_head, read_inputs
from deltakit.merging.opened_base import refuse_delta
from deltakit.merging.plan import Plan, plan_merge

_NEW_FILE = "they move whole tensors, all of which would stand in the journal; leave out --in-place"


@dataclass(frozen=True, slots=True, kw_only=True)
class InPlaceReport:
    """What a merge in place did, or would do with dry_run.

    model: the path of the checkpoint. deltas, weights: of this merge. merged_before: deltas that
    earlier merges left in the model. tensors: with entries of any of them. entries: all that differ
    from the original by now (the union of the supports). written: entries that this merge changed.
    extras: names of whole tensors written. files: weight files that hold entries. journal: its
    folder. journal_bytes: size of its files. base_mismatch_allowed: whether other base values were
    let through. notes: what the user should know.
    """

    model: str
    deltas: tuple[str, ...]
    weights: tuple[float, ...]
    merged_before: tuple[str, ...]
    tensors: int
    entries: int
    written: int
    extras: tuple[str, ...]
    files: tuple[str, ...]
    journal: str
    journal_bytes: int
    base_mismatch_allowed: bool
    dry_run: bool
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def merge_in_place(
    model: str | Path,
    deltas: Given | Sequence[Given],
    *,
    weights: Sequence[float] | None = None,
    allow_base_mismatch: bool = False,
    force: bool = False,
    dry_run: bool = False,
    head: int | str | Path | None = None,
    progress: Progress | None = None,
) -> InPlaceReport:
    """Merge one or several deltas into the files of a checkpoint, writing their entries alone.

    model: a .safetensors file or a folder. deltas, weights, allow_base_mismatch, head: as for
    `deltakit.merge`; deltas belong to the original base, also after earlier merges in
    place. force: write through symbolic and hard links. progress: called with (entries done,
    entries in all).

    Killed at any instant, the model is whole again after the next merge or revert, which rolls
    back what was not finished. Any exception rolls it back at once. Raises as `merge` does, and
    ConfigError where a new tensor, dtype or configuration would need a new file, OutputError for
    links and for files that cannot be written, JournalError where something else has changed the
    model since an earlier merge.
    """
    refuse_delta(model)
    given = read_inputs(deltas, weights)
    refuse_adapters([each.delta.adapter for each in given], "merging in place", _NEW_FILE)
    with OpenWeights(model) as opened:
        checkpoint = opened.checkpoint
        journal = Journal(checkpoint)
        journal.refuse_others()
        if dry_run:
            refuse_unfinished(locate(model))
        notes = [] if dry_run else settle(opened, journal)
        earlier = journal.merged()
        if not (force or (earlier is not None and earlier.through_links)):
            opened.refuse_links()
        if earlier is not None:
            earlier.check_coordinates(checkpoint)
            check_bits(checkpoint, earlier)
        before = journal.inputs(earlier)
        chosen = chosen_head(given, head)
        plan = plan_merge(
            Original(model, earlier),
            [*before, *given],
            settled=len(before),
            allow_base_mismatch=allow_base_mismatch,
            head=None if chosen is None else len(before) + chosen,
        )
        _refuse_what_needs_a_new_file(plan)
        overflows = Overflows()
        tensors = _tensors(plan, overflows)
        merged, files = kept(plan)
        through_links = force or (earlier is not None and earlier.through_links)
        record = Record(tensors, merged, journal.files, through_links)
        data = record.encode()
        if not dry_run:
            _write(opened, journal, record, earlier, files, data, progress)
    differ = [bits_before(t, earlier) != merged_bits(t) for t in record.tensors.values()]
    return InPlaceReport(
        model=str(checkpoint.path),
        deltas=tuple(each.label for each in given),
        weights=tuple(each.weight for each in given),
        merged_before=tuple(each.label for each in before),
        tensors=len(plan.touched),
        entries=sum(tensors[name].nnz for name in plan.touched),
        written=sum(int(np.count_nonzero(each)) for each in differ),
        extras=tuple(sorted(plan.extras, key=str.encode)),
        files=tuple(dict.fromkeys(checkpoint.info(name).file.name for name in tensors)),
        journal=str(journal.folder),
        journal_bytes=len(data) + sum(len(each) for each in files.values()),
        base_mismatch_allowed=allow_base_mismatch,
        dry_run=dry_run,
        notes=tuple(notes + plan.notes + overflows.notes() + _repeated(record, earlier)),
    )


def _refuse_what_needs_a_new_file(plan: Plan) -> None:
    """Headers and configurations stay as they are, so what would change them is refused."""
    hint = "merge into a new file instead"
    for name, array in plan.extras.items():
        info = plan.base.tensors.get(name)
        if info is None:
            raise ConfigError(
                f"extra {name!r} is not in {plan.base.path}, and merging in place adds no tensors; "
                + hint
            )
        if info.dtype != dtype_of(array).name:
            raise ConfigError(
                f"extra {name!r} is {dtype_of(array).name}, in {info.file} it is {info.dtype}, and "
                f"merging in place changes no dtypes; {hint}"
            )
    config, notes = merged_config(plan.base, plan.config, None)
    if config is not None:
        raise ConfigError(
            f"the deltas change config.json ({', '.join(sorted(plan.config))}), and merging in "
            f"place writes weights only; {hint}"
        )
    plan.notes.extend(notes)


def _tensors(plan: Plan, overflows: Overflows) -> dict[str, TensorDelta]:
    """Original and merged bits of all tensors that the merge changes, in the order of names."""
    found = {}
    for name, contributions in plan.touched.items():
        info = plan.base.info(name)
        at = union_between(contributions, 0, info.numel)
        original = plan.base.gather(name, at)
        merged = merged_words(original, at, contributions, info.kind)
        count_overflows(name, original, merged, info.kind, overflows)
        found[name] = _tensor(info, at, original, merged)
    for name, array in plan.extras.items():
        info = plan.base.info(name)
        at = np.arange(info.numel, dtype=np.int64)
        merged = np.ascontiguousarray(array).reshape(-1).view(info.kind.words)
        found[name] = _tensor(info, at, plan.base.gather(name, at), merged)
    return in_tensor_order(found)


def _tensor(info: TensorInfo, at: Array, original: Array, merged: Array) -> TensorDelta:
    return TensorDelta(
        name=info.name,
        shape=info.shape,
        dtype=info.dtype,
        mode="set",
        indices=at,
        values=original,
        base_values=merged,
    )


def _write(
    opened: OpenWeights,
    journal: Journal,
    record: Record,
    earlier: Record | None,
    deltas: Mapping[str, bytes],
    data: bytes,
    progress: Progress | None,
) -> None:
    """Journal, weights, commit: each is on the disk before the next begins."""
    try:
        journal.begin(deltas, data)
        opened.refuse_changes()
    except BaseException:
        journal.roll_back()
        raise
    try:
        done = 0
        for tensor in record.tensors.values():
            new = merged_bits(tensor)
            differ = np.flatnonzero(new != bits_before(tensor, earlier))
            opened.write(tensor.name, tensor.indices[differ], new[differ])
            done += tensor.nnz
            if progress is not None:
                progress(done, record.entries)
        opened.sync()
        journal.commit()
    except BaseException as error:
        _roll_back(opened, journal, error)
        raise


def _roll_back(opened: OpenWeights, journal: Journal, error: BaseException) -> None:
    try:
        roll_back(opened, journal)
        journal.prune()
    except (DeltakitError, OSError) as other:
        raise OutputError(
            f"{error}; rolling the merge back failed as well ({other}); the next merge into "
            f"{journal.model} or its revert does that first"
        ) from error


def _repeated(record: Record, earlier: Record | None) -> list[str]:
    """A delta that is merged once more is what its user wants, or a slip of the hand."""
    known = {each.file for each in earlier.merged} if earlier is not None else set()
    fresh = record.merged[len(earlier.merged) if earlier is not None else 0 :]
    return [
        f"{each.label} had been merged before; its changes count once more"
        for each in fresh
        if each.file in known
    ]
