"""The card of a repository of deltas: its README.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deltakit.publishing.card_body import sections
from deltakit.publishing.card_facts import facts_of
from deltakit.publishing.card_metadata import TAGS, metadata
from deltakit.publishing.card_previous import (
    END,
    KEEP,
    KEPT,
    Previous,
    begin,
    check_metadata,
    taken_apart,
)

_INVITATION = "<!-- Write here what people should know: what it is for, its limits. -->\n"


def card_text(
    files: Mapping[str, Path],
    *,
    repo_id: str,
    metrics: Mapping[str, Any] | None,
    settings: Mapping[str, Any] | None,
    previous: str | None,
) -> str:
    """The whole README.md of a repository of deltas: metadata and Markdown.

    files: name in the repository -> local .sdelta file, the main one first. metrics, settings: what
    its run recorded in metrics.json and config.yaml, where they are known. previous: the README.md
    that is there now, of which everything that people wrote is kept (see `card_previous`). Equal
    arguments give equal text, and the text as `previous` gives itself.

    Raises MissingFileError and FormatError for files that are no sound deltas, and ConfigError for
    a previous card that cannot be taken apart.
    """
    old = Previous() if previous is None else taken_apart(previous)
    facts = facts_of(files, repo_id, metrics, settings)
    theirs = {key: text for key, text in old.metadata.items() if key != "tags"}
    mine = metadata(facts, theirs, [tag for tag in old.tags if tag not in TAGS]).to_yaml()
    front = f"{mine}\n{''.join(theirs.values())}"
    check_metadata(front)
    kept = f"{KEEP}\n{_INVITATION if old.kept is None else old.kept}{KEPT}"
    before = f"{old.before.rstrip()}\n\n" if old.before.strip() else "\n"
    return (
        f"---\n{front}---\n{before}"
        f"{begin(yaml.safe_load(mine))}\n{sections(facts, kept)}\n{END}\n{old.after}"
    )
