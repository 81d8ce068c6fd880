"""What a push tells about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from deltakit.hub.branch import Content, Head
from deltakit.hub.digests import is_recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class PushedFile:
    """One file: its name in the repository, its size in bytes, and "new", "changed" or "unchanged"
    against what was there before."""

    name: str
    bytes: int
    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport:
    """What was published, or with `dry_run` would be.

    repo: owner/name, as it is called today. revision: the branch. commit: where the branch stands
    now; None where it does not exist yet. url: of the repository. created: whether the repository
    was made for this. changed: whether there is a new commit. tag: what the commit was named.
    """

    repo: str
    revision: str
    commit: str | None
    url: str
    created: bool
    changed: bool
    private: bool
    files: tuple[PushedFile, ...]
    tag: str | None
    dry_run: bool
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {**asdict(self), "files": [asdict(file) for file in self.files]}


def compared(files: Mapping[str, Content], head: Head) -> tuple[PushedFile, ...]:
    """The files to publish against those at the head."""
    before = {} if head.listing is None else head.listing.files
    made = []
    for name, content in files.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        same = is_recorded(content, before.get(name))
        status = "new" if name not in before else "unchanged" if same else "changed"
        made.append(PushedFile(name=name, bytes=size, status=status))
    return tuple(made)
