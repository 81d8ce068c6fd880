"""What a Hub for tests stores: repositories, their commits and files, and large objects."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

POINTER = 134  # bytes of the git-lfs pointer file that stands in git for a large file


@dataclass(frozen=True)
class Blob:
    """A file's content, and whether it is kept as a large object (git-lfs)."""

    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        """The name of a large object."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """The name of a git blob."""
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        """What a download calls it."""
        return self.sha256 if self.lfs else self.oid

    def described(self, path: str) -> dict[str, Any]:
        """The file as `tree` and `paths-info` tell it."""
        told = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        if self.lfs:
            large = {"oid": self.sha256, "size": len(self.data), "pointerSize": POINTER}
            told["lfs"] = large
        return told

    def sibling(self, path: str) -> dict[str, Any]:
        """The file as the information about a revision tells it."""
        told = {"rfilename": path, "size": len(self.data), "blobId": self.oid}
        if self.lfs:
            large = {"sha256": self.sha256, "size": len(self.data), "pointerSize": POINTER}
            told["lfs"] = large
        return told


@dataclass
class Repo:
    """A repository: commits (oid -> path -> Blob) and refs (branch, tag or refs/... -> oid)."""

    kind: str
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.commit("main", {})

    @property
    def owner(self) -> str:
        """The first part of the id."""
        return self.id.partition("/")[0]

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, tag, ref or commit id means."""
        return revision if revision in self.commits else self.refs.get(revision)

    def files(self, revision: str) -> dict[str, Blob]:
        """All files at a revision."""
        return self.commits[self.resolve(revision) or ""]

    def commit(self, branch: str, changes: dict[str, Blob | None]) -> str:
        """Add, replace and (None) delete files; returns the new commit's id."""
        parent = self.refs.get(branch, "")
        before = self.commits.get(parent, {})
        after = {path: blob for path, blob in {**before, **changes}.items() if blob is not None}
        if parent and after == before:
            return parent
        content = [parent, len(self.commits), sorted((p, b.oid) for p, b in after.items())]
        oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[oid] = after
        self.refs[branch] = oid
        return oid

    def tag(self, name: str, revision: str = "main") -> None:
        """Name a revision."""
        self.refs[name] = self.resolve(revision) or ""
        self.tags.add(name)

    def listed_refs(self) -> dict[str, Any]:
        """Branches and tags as the Hub lists them."""

        def told(name: str, prefix: str) -> dict[str, str]:
            return {"name": name, "ref": prefix + name, "targetCommit": self.refs[name]}

        branches = [n for n in self.refs if n not in self.tags and not n.startswith("refs/")]
        return {
            "branches": [told(name, "refs/heads/") for name in branches],
            "tags": [told(name, "refs/tags/") for name in sorted(self.tags)],
            "converts": [],
        }
