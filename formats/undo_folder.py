"""Where the journal of merges into a checkpoint's own files stands, and whether one is unfinished.

The folder's states and the rest of what it holds are told in `deltakit.in_place.journal`.
"""

from __future__ import annotations

from pathlib import Path

from deltakit.errors import DeltakitError, JournalError
from deltakit.formats.checkpoint_files import Located, locate

SUFFIX = ".undo"
UNDO, NEXT, REVERTING = "undo.sdelta", "next.sdelta", "reverting.sdelta"


def undo_folder(located: Located) -> Path:
    """The place of a checkpoint's journal, whether it exists or not: beside the index where there
    is one, otherwise beside the weight file, and called after it."""
    named = located.index or located.files[0]
    return named.with_name(named.name + SUFFIX)


def is_unfinished(folder: Path) -> bool:
    """Whether a merge or a revert has begun by this journal and not ended."""
    return (folder / NEXT).exists() or (folder / REVERTING).exists()


def refuse_unfinished(located: Located) -> None:
    """Raise JournalError where a merge in place, or its revert, has begun and not ended: the
    weights are then neither of the two states.

    That of an index counts for its shards too, when they are read one by one.
    """
    own = undo_folder(located)
    for folder in sorted(own.parent.glob(f"*{SUFFIX}")):
        model = folder.with_name(folder.name.removesuffix(SUFFIX))
        if not is_unfinished(folder) or not (folder == own or _share(model, located)):
            continue
        mend = f"deltakit revert {model} finishes it"
        what = "revert"
        if (folder / NEXT).exists():
            what = "merge in place"
            mend = (
                f"deltakit merge --in-place rolls it back and begins again, deltakit revert {model} "
                "takes back all that was merged"
            )
        raise JournalError(
            f"{model} holds only a part of a {what} that was interrupted or still runs (journal "
            f"{folder}); {mend}"
        )


def _share(model: Path, located: Located) -> bool:
    try:
        return bool(set(locate(model).files) & set(located.files))
    except DeltakitError:  # a journal whose model is gone
        return False
