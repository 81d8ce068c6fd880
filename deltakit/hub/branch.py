"""The branch of a repository that files are published to: its head, new commits, tags."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deltakit.errors import ConfigError, HubConflictError, HubError
from deltakit.hub.cache import COMMIT
from deltakit.hub.digests import is_recorded
from deltakit.hub.failures import patiently
from deltakit.hub.listing import Entry, Listing, listing_of
from deltakit.hub.location import Location
from deltakit.hub.refused_writes import writing

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

Content = Path | bytes  # of a file to be published


@dataclass(frozen=True, slots=True)
class Head:
    """Where a branch stands now.

    location: the repository under the name that it has today, and the branch. private: whether only
    its owner sees the repository; None where there is none. listing: the files at the newest commit;
    None where there is no such branch.
    """

    location: Location
    private: bool | None
    listing: Listing | None


def read_head(location: Location) -> Head:
    """Ask the Hub, never the cache; raises HubError, and ConfigError for a tag or a commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api, branch = HfApi(), location.revision or "main"
    if COMMIT.fullmatch(branch):
        raise ConfigError(f"{location}: commits stay as they are; give a branch to publish to")
    with writing(location):
        try:
            info = patiently(lambda: api.model_info(location.repo, files_metadata=True))
        except RepositoryNotFoundError:
            return Head(location, None, None)
        private = bool(info.private)
        location = replace(location, repo=info.id)
        if branch != "main":
            if not branch.startswith("refs/"):
                refs = patiently(lambda: api.list_repo_refs(location.repo))
                if branch in {each.name for each in refs.tags}:
                    raise ConfigError(f"{location}: tags stay as they are; give a branch")
                if branch not in {each.name for each in refs.branches}:
                    return Head(location, private, None)
            info = patiently(
                lambda: api.model_info(location.repo, revision=branch, files_metadata=True)
            )
        return Head(location, private, listing_of(location, info))


def make_branch(head: Head, *, private: bool) -> Head:
    """Make the repository and the branch where they are missing; what is there stays as it is."""
    from huggingface_hub import HfApi

    api, location = HfApi(), head.location
    with writing(location):
        if head.private is None:
            patiently(
                lambda: api.create_repo(location.repo, private=private or None, exist_ok=True)
            )
        if location.revision not in (None, "main"):
            branch = location.revision or ""
            patiently(lambda: api.create_branch(location.repo, branch=branch, exist_ok=True))
    made = read_head(location)
    if made.listing is None:
        raise HubError(f"{location}: the Hub does not show what it has just made; try again later")
    return made


def upload(listing: Listing, files: Mapping[str, Content]) -> list[CommitOperationAdd]:
    """Send the large ones of `files`, by name, to the store of the listing's repository.

    They appear nowhere before the commit; what the store has already is not sent again. Raises
    HubError.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    additions = [CommitOperationAdd(name, content) for name, content in files.items()]
    with writing(listing.location), _bars_on_terminals():
        HfApi().preupload_lfs_files(
            listing.location.repo,
            additions,
            revision=listing.location.revision or "main",
            free_memory=False,
        )
    return additions


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Keep the client's bars, which tell speed and time left, out of logs and pipes."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported, but lazily
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    settled = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled()
    if settled or sys.stderr.isatty():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def commit(listing: Listing, additions: list[CommitOperationAdd], message: str) -> str:
    """Add uploaded files to the branch by one commit upon `listing`'s; returns its id.

    Raises HubConflictError when the branch has moved on, HubUnavailableError when it is not known
    whether the commit was made, and HubError.
    """
    from huggingface_hub import HfApi

    with writing(listing.location):
        made = HfApi().create_commit(
            listing.location.repo,
            additions,
            commit_message=message,
            revision=listing.location.revision,
            parent_commit=listing.commit or None,
        )
    return made.oid


def missing(listing: Listing, additions: list[CommitOperationAdd], made: str) -> list[str]:
    """The files that the Hub does not have, or not as they were sent, at the commit `made`."""
    from huggingface_hub import HfApi

    location = listing.location
    with writing(location):
        info = patiently(
            lambda: HfApi().model_info(location.repo, revision=made, files_metadata=True)
        )
    there = listing_of(location, info).files
    return [each.path_in_repo for each in additions if not _holds(there, each)]


def _holds(there: Mapping[str, Entry], sent: CommitOperationAdd) -> bool:
    entry = there.get(sent.path_in_repo)
    if entry is not None and entry.sha256 is not None:
        return entry.sha256 == sent.upload_info.sha256.hex()  # known since the upload
    with sent.as_file() as file:
        return is_recorded(file.read(), entry)


def tags(location: Location) -> dict[str, str]:
    """The commit of each tag of a repository."""
    from huggingface_hub import HfApi

    with writing(location):
        refs = patiently(lambda: HfApi().list_repo_refs(location.repo))
    return {each.name: each.target_commit for each in refs.tags}


def set_tag(location: Location, tag: str, to: str) -> None:
    """Name the commit `to`; raises HubConflictError where the tag names another."""
    from huggingface_hub import HfApi

    try:
        with writing(location):
            patiently(lambda: HfApi().create_tag(location.repo, tag=tag, revision=to))
    except HubConflictError:
        if (
            tags(location).get(tag) != to
        ):  # else an answer was lost and the tag was set all the same
            raise
