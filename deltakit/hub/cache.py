"""The cache of huggingface_hub on disk, whose layout its guide "Understand caching" fixes:

models--owner--name/refs/REVISION             the commit that a branch or tag meant last
models--owner--name/snapshots/COMMIT/PATH     the files, mostly links to blobs
models--owner--name/blobs/ETAG                their bytes
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

COMMIT = re.compile(r"[0-9a-f]{40}")


def _storage(repo: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repo, repo_type="model")
    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / folder


def snapshot(repo: str, commit: str) -> Path:
    """The folder of the files of a commit; it holds those that were downloaded."""
    return _storage(repo) / "snapshots" / commit


def known_commit(repo: str, revision: str | None) -> str | None:
    """The commit that a revision means as far as the cache knows, if it holds any files of it."""
    revision = revision or "main"
    try:
        ref = _storage(repo) / "refs" / revision
        commit = revision if COMMIT.fullmatch(revision) else ref.read_text("utf-8").strip()
    except OSError:
        return None
    return commit if COMMIT.fullmatch(commit) and snapshot(repo, commit).is_dir() else None


def remember(repo: str, revision: str | None, commit: str) -> None:
    """Note which commit a branch or tag means now, for when the Hub is away."""
    revision = revision or "main"
    ref = _storage(repo) / "refs" / revision
    if revision == commit or (ref.is_file() and ref.read_text("utf-8") == commit):
        return
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit, "utf-8")


def holds(repo: str, digest: str | None) -> bool:
    """Whether the cache has the bytes of this digest, of whatever commit."""
    return digest is not None and (_storage(repo) / "blobs" / digest).is_file()


def room() -> int:
    """Free bytes on the disk of the cache, whose folder may not be there yet."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    return shutil.disk_usage(there).free


def forget(file: Path) -> None:
    """Remove a file of a snapshot and the bytes that it links to."""
    file.resolve().unlink()
    file.unlink(missing_ok=True)
