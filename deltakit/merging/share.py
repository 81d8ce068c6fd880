"""One job's share of a merge: its own weight files, and the whole output where it is the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from deltakit.errors import ConfigError, OutputError
from deltakit.formats.atomic import refuse_existing
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.partial_folder import is_whole
from deltakit.formats.shared_folder import SharedFolder, joined_folder
from deltakit.merging.base_values import check_arrived
from deltakit.merging.files import WeightFile
from deltakit.merging.inputs import Input
from deltakit.merging.naming import SUFFIX, Output
from deltakit.merging.outlines import read_again
from deltakit.merging.output import (
    Progress,
    Writing,
    check_space,
    merge_key,
    write_small,
    write_weights,
)
from deltakit.merging.plan import Plan
from deltakit.shares import Shard, ShareReport
from deltakit.streaming import by_file


class MergeJob:
    """A job of a job array that merges into one folder.

    files: names of its weight files, neighbours in the base's order, balanced by their bytes there.
    Raises ConfigError for an output that is a lone file and for requantizing.
    """

    def __init__(
        self, shard: Shard, base: Checkpoint, output: Output, force: bool, requantize: bool
    ) -> None:
        if not output.is_folder:
            raise ConfigError(
                f"{output.path} is one {SUFFIX} file, and shards are shared out by weight files; "
                "merge into a folder, or without --shard"
            )
        if requantize:
            raise ConfigError(
                "what survives quantising again is counted over the whole model; requantize "
                "without --shard"
            )
        self.shard, self._base, self._output, self._force = shard, base, output, force
        held = {
            name: sum(info.nbytes for info in file.tensors.values())
            for name, file in base.shards.items()
        }
        self.files = frozenset(shard.of(list(held), held.__getitem__))

    def with_entries(self, inputs: Sequence[Input]) -> list[Input]:
        """The outlines of deltas with the entries of this job's tensors."""
        own = {
            name
            for file, names in by_file(self._base).items()
            if file in self.files
            for name in names
        }
        found = []
        for each in inputs:
            if each.elsewhere and each.file is not None:
                delta, elsewhere = read_again(each.file, own)
                each = replace(each, delta=delta, elsewhere=elsewhere)
            found.append(each)
        return found

    def compared(self, plan: Plan) -> Plan:
        """The plan once the base values in this job's files are compared; raises as `plan_merge`."""
        for name in self._base.shards:
            if name in self.files:
                check_arrived(plan, name)
        return replace(plan, deferred=())

    def write(
        self, writing: Writing, plan: Plan, progress: Progress | None, workers: int | None
    ) -> ShareReport:
        """Write what is missing of this job's files, and publish the folder where all of it is there.

        progress, workers: as for `deltakit.merging.output.write_output`, of its own files.
        """
        own = [file for file in writing.weights if file.name in self.files]
        with joined_folder(self._output.path, merge_key(plan, writing)) as folder:
            if folder is not None:
                return self._take_part(folder, own, writing, plan, progress, workers)
        return self._report(len(writing.weights), [], own, [], published=False)

    def _take_part(
        self,
        folder: SharedFolder,
        own: Sequence[WeightFile],
        writing: Writing,
        plan: Plan,
        progress: Progress | None,
        workers: int | None,
    ) -> ShareReport:
        path, files = self._output.path, writing.weights
        refuse_existing(path, self._force)
        finished = [file for file in own if is_whole(folder.path / file.name, file.size)]
        rest = [file for file in own if file not in finished]
        if folder.is_busy and rest:
            raise OutputError(f"another process is writing {path}; wait for it, or stop it")
        check_space(path, sum(file.size for file in rest))
        write_weights(own, finished, plan, folder.path, progress, workers)
        alone = folder.is_alone()
        missing = [file for file in files if not is_whole(folder.path / file.name, file.size)]
        if folder.is_done:
            missing = []
        published = alone and not missing
        if published:
            write_small(writing, folder.path)
            published = folder.publish([file.name for file in files])
        return self._report(len(files), rest, finished, missing, published=published)

    def _report(
        self,
        files: int,
        written: Sequence[WeightFile],
        found: Sequence[WeightFile],
        missing: Sequence[WeightFile],
        *,
        published: bool,
    ) -> ShareReport:
        return ShareReport(
            shard=str(self.shard),
            files=files,
            written=tuple(file.name for file in written),
            found=tuple(file.name for file in found),
            missing=tuple(file.name for file in missing),
            published=published,
        )
