"""Where a merge goes when nobody says, and where it must not go.

The default name is made of the base's and the delta's: `base.safetensors` and `run.sdelta` give
`base-run.safetensors`; a folder `base/` gives the folder `base-run`; several deltas, or deltas that
are not files, give `base-merged`. It stands beside the first delta file (beside the base where
there is none, or where that would be inside the base's own folder).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltakit.errors import OutputError, OutputExistsError
from deltakit.formats.atomic import refuse_existing
from deltakit.formats.checkpoint import Checkpoint

SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Output:
    """A file, or a folder, that a merge writes."""

    path: Path
    is_folder: bool


def output_for(
    base: Checkpoint, delta_paths: Sequence[Path], out: str | Path | None, many: bool
) -> Output:
    """The output of merging onto `base`.

    out: as given by the user, or None for the default name. It is a file when it ends in
    .safetensors, or when the base is a lone file and it has any suffix; otherwise a folder.
    delta_paths: of those deltas that are files. many: whether there are several deltas.
    """
    if out is None:
        return _default(base, delta_paths, many)
    path = Path(out)
    as_folder = str(out).endswith(("/", os.sep)) or (base.directory is not None or not path.suffix)
    return Output(path, as_folder and path.suffix != SUFFIX)


def check_output(
    output: Output, base: Checkpoint, delta_paths: Sequence[Path], force: bool
) -> None:
    """Refuse an output that would destroy an input or anything that is not a merge's own.

    Raises OutputExistsError for one that exists (`force` lifts this) and OutputError for one that
    is an input, stands inside the base's folder or holds an input, and for a folder to be replaced
    that holds no checkpoint.
    """
    target = output.path.resolve()
    inputs = [*base.files, *delta_paths, *([base.directory] if base.directory else [])]
    sources = [path.resolve() for path in inputs]
    if target in sources:
        raise OutputError(f"{output.path} is an input of the merge; give another output")
    held = [source for source in sources if output.is_folder and target in source.parents]
    if held:
        raise OutputError(f"{output.path} holds the input {held[0]}; give another output")
    if output.is_folder and base.directory and base.directory.resolve() in target.parents:
        raise OutputError(f"{output.path} is inside the base's own folder; give another output")
    refuse_existing(output.path, force)
    if output.path.exists() and output.path.is_dir() != output.is_folder:
        kind = "file" if output.is_folder else "folder"
        raise OutputExistsError(f"{output.path} exists and is a {kind}; give another output")
    if output.is_folder and output.path.is_dir() and not _is_replaceable(output.path):
        raise OutputError(
            f"{output.path} is a folder that holds no {SUFFIX} file, so it is not replaced by a "
            "merge; give another output or remove it"
        )


def _is_replaceable(folder: Path) -> bool:
    return any(folder.glob(f"*{SUFFIX}")) or not any(folder.iterdir())


def _default(base: Checkpoint, delta_paths: Sequence[Path], many: bool) -> Output:
    second = "merged" if many or not delta_paths else delta_paths[0].stem
    if base.directory is None:
        parent = delta_paths[0].parent if delta_paths else base.named_after.parent
        return Output(parent / f"{base.named_after.stem}-{second}{SUFFIX}", is_folder=False)
    folder = base.named_after.resolve()
    parent = delta_paths[0].parent if delta_paths else folder.parent
    if parent.resolve() == folder or folder in parent.resolve().parents:
        parent = folder.parent
    return Output(parent / f"{folder.name}-{second}", is_folder=True)
