"""Merging deltas into a checkpoint, exactly and in bounded memory, into a new file or folder.

Every entry becomes round(float32(base) + v) to the base's dtype, nearest even; all other bytes of
the body are those of the base. The rule for several deltas, weights and `set` entries stands in
`deltakit.merging.arithmetic`, the default output name in `deltakit.merging.naming`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltakit.combine.weights import Weight
from deltakit.errors import ConfigError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.merging.carry import carried_files, merged_config
from deltakit.merging.files import Overflows, index_file, weight_files
from deltakit.merging.inputs import Given, read_inputs
from deltakit.merging.naming import Output, check_output, output_for
from deltakit.merging.opened_base import comes_in_parts, opened_base
from deltakit.merging.output import Progress, Writing, write_output
from deltakit.merging.plan import Plan, plan_merge
from deltakit.merging.quantized import Survival, quantized_in
from deltakit.merging.share import MergeJob
from deltakit.shares import Shard, ShareReport
from deltakit.stacking import stacked


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What a merge did, or would do with dry_run.

    output: the path written. is_folder: whether it is a folder. base: its path, or its location at
    the very commit. base_id, base_revision: its repository and commit where they are known. deltas,
    weights, method, dtype: as given. bytes: size of all output files. tensors: that are
    changed. entries: entries that change (the union of the supports), those of adapters beside them. extras: names of whole tensors written.
    files: names of the files in the output. peak_memory: upper estimate in bytes.
    base_mismatch_allowed: whether other base values were let through. notes: what the user should
    know. survival: what is left of entries in quantised tensors (None where none was quantised again).
    share: what a job of a job array did (None without `shard`); entries are those in its own files then.
    """

    output: str
    is_folder: bool
    base: str
    base_id: str | None
    base_revision: str | None
    deltas: tuple[str, ...]
    weights: tuple[Weight, ...]
    method: str | None
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
    survival: Survival | None = None
    share: ShareReport | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def merge(
    base: str | Path | Checkpoint | None,
    deltas: Given | Sequence[Given],
    out: str | Path | None = None,
    *,
    weights: Sequence[Weight] | None = None,
    method: str | None = None,
    dtype: str | None = None,
    allow_base_mismatch: bool = False,
    force: bool = False,
    dry_run: bool = False,
    head: int | str | Path | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
    shard: Shard | str | tuple[int, int] | None = None,
    requantize: bool = False,
    keep_base: bool = True,
    **options: Any,
) -> MergeReport:
    """Merge one or several deltas into a base and write a new checkpoint.

    base: a .safetensors file or a folder; None takes the repository and commit that the deltas record
    (see `deltakit.merging.recorded_base`). deltas: SparseDelta objects or paths of .sdelta files, in
    order. Any of them may be on the Hub (`hf://owner/repo[@revision][/file]`). out: a file or folder
    (see `deltakit.merging.naming`); a folder takes over the base's shards one to one, its tokenizer
    and its configuration with the deltas' changes.
    weights: one factor per delta, 1 by default (with a method also by patterns of tensor names).
    method, options: stack the deltas by a method first; see `deltakit.stacking.stack`, which gives
    the same bits. dtype: None keeps the base's; "trained" casts the
    whole base to the dtype of training first and so reproduces the trained bits; "bfloat16" and
    others merge in the base's dtype and then convert all floating tensors.
    head: which delta's extras and configuration win where several differ, by position or path.
    progress: called with (bytes done, bytes in all), perhaps by other threads. workers: threads that
    write a folder's weight files, one each; by default as many as there are processors, at most 4.
    A merge into a folder that was killed, or to which the Hub was lost, is gone on with by the next one
    with the same inputs: weight files that are whole are kept.

    shard: (i, n) or "i/n" makes this job i of n, counted from 1, of a job array. The jobs run in any
    order, together or not, on machines that share a file system. Each merges its own share of the
    base's weight files into one hidden folder beside `out`, and the one that finishes last puts that
    in its place, byte for byte what one merge writes. A job that is run again, killed or not, does
    what is missing of its share; the report tells what others have to do. It reads the entries of
    its own files alone (of all with `method` and of adapters), and of the base nothing but its own
    files, whose values are compared before it writes. A merge without shard goes on with what jobs
    have finished; jobs with other inputs or options are refused while a part is there.

    keep_base: of a base on the Hub, whether weight files that are downloaded for this stay in the
    cache. Into a folder they come one at a time, each compared with what the deltas record and merged
    before the next, so that without keeping them the disk need not hold more than one of them.

    Deltas of adapters of the LoRA family are folded: what an adapter adds to a weight is one term of
    the sum, made window by window in float32 (see `deltakit.adapters.fold`), and every element that it
    adds nothing to keeps its bits. They go together with deltas of weights, in order.

    requantize: merge onto tensors that bitsandbytes has quantised to 4 or 8 bits by quantising
    their blocks again, which is refused otherwise (see `deltakit.merging.quantized`); needs torch and
    bitsandbytes. What survives is in the report, also with dry_run.

    Every delta is checked before anything is written, and nothing partial is left behind. Raises
    BaseMismatchError for another base (unless allowed), CoordinateError for unknown tensors and
    other shapes, DeltaError for deltas that contradict each other and adapters that do not fold (such
    as bottlenecks), OutputExistsError for an output
    that exists (unless `force`) and OutputError where it cannot be written.
    """
    numbers = None if weights is None else [w for w in weights if not isinstance(w, Mapping)]
    if method is None and numbers is not None and len(numbers) != len(weights or ()):
        method = "linear"  # the same sum, with weights by pattern
    shard = None if shard is None else Shard.parse(shard)
    given = read_inputs(
        deltas, numbers if method is None else None, outlines=shard is not None and method is None
    )
    checkpoint, settled = opened_base(base, given, keep_base, dry_run)
    paths = [each.path for each in given if each.path is not None]
    output = output_for(checkpoint, paths, out, many=len(given) > 1)
    check_output(output, checkpoint, paths, force or shard is not None)
    whole = requantize or any(each.delta.adapter is not None for each in given)
    defer = comes_in_parts(checkpoint, output, keep_base, whole)
    job = None
    if shard is not None:
        job = MergeJob(shard, checkpoint, output, force, requantize)
        given = given if method else job.with_entries(given)
    inputs, notes = given, settled
    if method is not None:
        again = quantized_in(given, checkpoint, requantize=requantize)
        known = None if again or defer else checkpoint  # codes tell stacking nothing about the base
        inputs = [stacked(given, method, weights, options, known, head, allow_base_mismatch)]
        notes, head = [*settled, *inputs[0].delta.provenance.get("notes", ())], None
    elif options:
        raise ConfigError(f"{next(iter(options))} is an option of stacking methods; give a method")
    plan = plan_merge(
        checkpoint,
        inputs,
        dtype=dtype,
        allow_base_mismatch=allow_base_mismatch,
        head=head,
        requantize=requantize,
        defer=defer or job is not None,
    )
    if job is not None and not defer:
        plan = job.compared(plan)
    if defer and dry_run:
        plan.notes.append("base values are compared when the base is downloaded, not in a dry run")
    overflows = Overflows()
    writing = _prepare(plan, output, overflows)
    sizes = writing.sizes
    share = None
    if not dry_run:
        if defer:  # one file at a time, under the bars of its downloads
            progress, workers = None, 1
        if job is None:
            write_output(writing, plan, output, progress, workers)
        else:
            share = job.write(writing, plan, progress, workers)
    survival = None if plan.requantizer is None else plan.requantizer.survival()
    if survival is not None:
        plan.notes.append(survival.note())
    return MergeReport(
        output=str(output.path),
        is_folder=output.is_folder,
        base=str(checkpoint),
        base_id=checkpoint.model_id,
        base_revision=checkpoint.revision,
        deltas=tuple(each.label for each in given),
        weights=tuple(weights or [1.0] * len(given)) if method else tuple(i.weight for i in given),
        method=method,
        dtype=dtype,
        bytes=sum(sizes.values()),
        tensors=len(plan.touched.keys() | plan.folded.keys()),
        entries=plan.entries,
        extras=tuple(sorted(plan.extras, key=str.encode)),
        files=tuple(sizes),
        peak_memory=plan.peak_memory,
        base_mismatch_allowed=allow_base_mismatch,
        dry_run=dry_run,
        notes=tuple(notes + plan.notes + overflows.notes()),
        survival=survival,
        share=share,
    )


def _prepare(plan: Plan, output: Output, overflows: Overflows) -> Writing:
    converted = plan.untouched if plan.dtype == "trained" else plan.dtype
    config, notes = merged_config(plan.base, plan.config, converted)
    if not output.is_folder:
        if plan.config and plan.base.directory is not None:
            notes = [f"{output.path} is a lone file, so configuration changes are not written"]
        plan.notes.extend(notes)
        return Writing(weight_files(plan, overflows, output.path.name), [], {})
    files = weight_files(plan, overflows)
    small = index_file(plan, files)
    carried, more = carried_files(plan.base)
    if config is not None:
        small["config.json"] = config
        carried = [file for file in carried if file.name != "config.json"]
    plan.notes.extend(notes + more)
    return Writing(files, carried, small)
