"""Publishing deltas, or a whole model, on the Hub: everything of one push by one commit."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING

from deltakit.errors import (
    ConfigError,
    HubAccessError,
    HubConflictError,
    HubError,
    HubNotFoundError,
    HubUnavailableError,
)
from deltakit.hub import branch
from deltakit.hub.branch import Content, Head, make_branch, read_head
from deltakit.hub.digests import is_recorded
from deltakit.hub.failures import WAITS, endpoint
from deltakit.hub.listing import Listing
from deltakit.hub.locate import Given
from deltakit.hub.location import Location, is_location
from deltakit.publishing.contents import Contents, gather
from deltakit.publishing.push_report import PushReport, compared
from deltakit.publishing.with_card import CARD, with_card

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_log = logging.getLogger(__name__)


def push(
    sources: Given | Iterable[Given],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    create: bool = True,
    tag: str | None = None,
    dry_run: bool = False,
    force: bool = False,
) -> PushReport:
    """Publish .sdelta files, the folder of a run, or the folder of a model; one commit, or none.

    sources: a path or several; a run is its deltas with config.yaml and metrics.json, in which local
    paths are cut to names; a model is its safetensors, configuration and tokenizer. Deltas come with
    a card, README.md, made anew around what a person wrote into it.
    repo_id: "owner/name" or "hf://owner/name[@revision]". revision: a branch, "main" by default.
    create: make the repository, `private` or public, and the branch where they are missing.
    message: of the commit. tag: a name for it. dry_run: ask the Hub and tell, but change nothing.
    force: replace even what somebody else pushed under the same names while this was running.

    Every delta is checked against its own digests first. The commit is made upon the head that was
    read; where the branch moves on meanwhile, the head is read again. A push that fails before its
    commit leaves nothing but perhaps an empty repository or branch; one that changes nothing makes
    no commit. Raises ConfigError, MissingFileError and FormatError for what cannot be published,
    HubConflictError where somebody else changed the same files or holds the tag, and HubError.
    """
    location = _target(repo_id, revision)
    contents = gather([sources] if isinstance(sources, (str, PathLike)) else sources)
    _check_login(location, needed=not dry_run)
    head = read_head(location)
    _refuse_to_expose(head, private)
    created = head.private is None
    if head.listing is None and not create:
        raise _nothing_there(head)
    files, notes = with_card(contents, head)  # whatever is wrong with it comes before anything made
    if head.listing is None and not dry_run:
        head = make_branch(head, private=private)
        _refuse_to_expose(head, private)
        files, notes = with_card(contents, head)  # a new branch begins with what main holds
    pushed = compared(files, head)
    changed = any(file.status != "unchanged" for file in pushed)
    commit = None if head.listing is None else head.listing.commit
    if tag is not None and commit is not None:
        _check_tag(head.location, tag, None if changed else commit)
    if changed and not dry_run:
        commit = _published(contents, head, files, message or _message(contents), force=force)
    if tag is not None and commit is not None and not dry_run:
        _tag(head.location, tag, commit)
    return PushReport(
        repo=head.location.repo,
        revision=head.location.revision or "main",
        commit=commit,
        url=f"{endpoint()}/{head.location.repo}",
        created=created,
        private=private if head.private is None else head.private,
        changed=changed,
        files=pushed,
        tag=tag,
        dry_run=dry_run,
        notes=(*notes, *_renamed(location, head)),
    )


def _published(
    contents: Contents, head: Head, files: Mapping[str, Content], message: str, *, force: bool
) -> str:
    """The commit by which the branch holds all files, made upon the newest head."""
    waits = iter(WAITS)
    while True:
        listing = _listing(head)
        new = {n: c for n, c in files.items() if not is_recorded(c, listing.files.get(n))}
        if not new:  # the answer to the commit was lost, or somebody else pushed the same
            return listing.commit
        additions = branch.upload(listing, new)
        try:
            commit = branch.commit(listing, additions, message)
        except (HubConflictError, HubUnavailableError):
            wait = next(waits, None)
            if wait is None:
                raise
            time.sleep(wait)
        else:
            _confirm(listing, additions, commit)
            return commit
        head = read_head(head.location)
        taken = _overtaken(listing, _listing(head), files)
        if taken and not force:
            raise HubConflictError(
                f"{head.location}: somebody else published {', '.join(taken)} meanwhile, so nothing "
                f"was published; look at {endpoint()}/{head.location.repo}/commits, then run the "
                "same command again to replace that"
            )
        files, _ = with_card(contents, head)


def _overtaken(before: Listing, now: Listing, files: Mapping[str, Content]) -> list[str]:
    """Which of the files somebody else changed, to something else than is published here.

    Not the card, which is made of what is there in any case.
    """
    return [
        name
        for name, content in files.items()
        if name != CARD
        and now.files.get(name) != before.files.get(name)
        and not is_recorded(content, now.files.get(name))
    ]


def _confirm(listing: Listing, additions: list[CommitOperationAdd], commit: str) -> None:
    """Raise HubError where the Hub does not have at `commit` what was sent."""
    try:
        lacking = branch.missing(listing, additions, commit)
    except HubUnavailableError as error:
        _log.warning("%s; the commit %s stands, but was not looked at again", error, commit[:12])
        return
    if lacking:
        raise HubError(
            f"{listing.location}: at commit {commit[:12]} the Hub does not have "
            f"{', '.join(lacking)} as sent; the repository's .gitignore may name it, or the file "
            "changed meanwhile: mend that and run the same command again"
        )


def _listing(head: Head) -> Listing:
    if head.listing is None:
        raise HubConflictError(
            f"{head.location}: the branch was removed meanwhile; run the same command again"
        )
    return head.listing


def _target(repo_id: str, revision: str | None) -> Location:
    location = Location.parse(repo_id if is_location(repo_id) else f"hf://{repo_id}")
    if location.path:
        raise ConfigError(
            f"{location}: a whole repository is published to, not a file or folder in it; give "
            f"{replace(location, path='')}"
        )
    if None not in (revision, location.revision) and revision != location.revision:
        raise ConfigError(f"{location} names a revision, and the option revision is {revision}")
    return Location.parse(str(replace(location, revision=location.revision or revision)))


def _check_login(location: Location, *, needed: bool) -> None:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise HubUnavailableError(
            f"{location}: offline mode is on (HF_HUB_OFFLINE), and publishing needs the Hub; run "
            "without it"
        )
    if needed and get_token() is None:
        raise HubAccessError(
            f"{location}: nobody is logged in; log in (hf auth login, or HF_TOKEN) with a token that "
            "may write"
        )


def _refuse_to_expose(head: Head, private: bool) -> None:
    if private and head.private is False:
        raise ConfigError(
            f"{head.location} is public already, and private was asked for; make it private on "
            f"{endpoint()}/{head.location.repo}/settings first, or give another repository"
        )


def _nothing_there(head: Head) -> HubNotFoundError:
    what = f"no repository {head.location.repo}"
    if head.private is not None:
        what = f"no branch {head.location.revision} in {head.location.repo}"
    return HubNotFoundError(
        f"{head.location}: the Hub shows {what}; check the name and who is logged in, or have it "
        "made by leaving out --no-create"
    )


def _check_tag(location: Location, tag: str, wanted: str | None) -> None:
    """Raise HubConflictError for a tag that is taken, unless by the commit `wanted`."""
    Location.parse(str(replace(location, revision=tag)))  # refuses what git could not have
    taken = branch.tags(location).get(tag)
    if taken not in (None, wanted):
        raise HubConflictError(
            f"{location}: the tag {tag} is that of commit {str(taken)[:12]} already; give another "
            f"tag, or delete it first (hf repos tag delete {location.repo} {tag})"
        )


def _tag(location: Location, tag: str, commit: str) -> None:
    try:
        branch.set_tag(location, tag, commit)
    except HubError as error:
        raise type(error)(
            f"{location}: commit {commit[:12]} is published, but the tag {tag} is not set; run the "
            f"same command again, which sets the tag alone ({error})"
        ) from None


def _message(contents: Contents) -> str:
    first, *rest = contents.deltas or contents.files
    return f"Publish {first}" + (f" and {len(rest)} more" if rest else "")


def _renamed(asked: Location, head: Head) -> tuple[str, ...]:
    if head.location.repo == asked.repo:
        return ()
    return (f"{asked.repo} is called {head.location.repo} now, and was published to as that",)
