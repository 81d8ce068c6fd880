"""The files of a push with the card that describes the whole repository as it will be."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltakit.errors import ConfigError, DeltakitError, HubError
from deltakit.hub.branch import Content, Head
from deltakit.hub.choice import DELTA, WEIGHTS
from deltakit.hub.digests import is_recorded
from deltakit.hub.fetch import fetch
from deltakit.hub.listing import Listing
from deltakit.publishing.contents import (
    METRICS,
    SETTINGS,
    Contents,
    check_delta,
    main_first,
    parsed_metrics,
    parsed_settings,
)

CARD = "README.md"
_log = logging.getLogger(__name__)


def with_card(contents: Contents, head: Head) -> tuple[dict[str, Content], tuple[str, ...]]:
    """All files to publish by their names, and notes on what stands beside them.

    Deltas get a card, made anew around what a person wrote into the README.md that is there; a
    model gets none. What the card tells of deltas that stay in the repository is read from the
    Hub. Raises ConfigError where deltas and weights would stand together, and HubError.
    """
    from deltakit.publishing.card import card_text  # loads huggingface_hub

    _refuse_mixture(contents, head)
    if not contents.deltas:
        return dict(contents.files), contents.notes
    others = {} if head.listing is None else _others(head.listing, contents)
    family = main_first({**contents.deltas, **others})
    metrics, settings = contents.metrics, contents.settings
    notes = [*contents.notes]
    if others:
        notes.append(f"{', '.join(others)} was there before and stays as it is")
    if len(family) > 1 and f"delta{DELTA}" not in family:
        notes.append(
            f"of several deltas none is called delta{DELTA}; name one when you use it, such as "
            f"{head.location}/{next(iter(family))}"
        )
    if head.listing is not None and metrics is None and METRICS in head.listing.files:
        if _stand(contents, head.listing):
            metrics, settings = _records(head.listing)
        else:
            notes.append(f"{METRICS} there is of an earlier push, so the card does not tell of it")
    text = card_text(
        family,
        repo_id=head.location.repo,
        metrics=metrics,
        settings=settings,
        previous=_previous(head.listing),
    )
    return {**contents.files, CARD: text.encode()}, tuple(notes)


def _refuse_mixture(contents: Contents, head: Head) -> None:
    theirs, ours = (WEIGHTS, "deltas") if contents.deltas else (DELTA, "a model")
    there = [] if head.listing is None else [n for n in head.listing.files if n.endswith(theirs)]
    if there:
        raise ConfigError(
            f"{head.location} holds {there[0]}, and {ours} beside it could not be told apart; give "
            "another repository"
        )


def _others(listing: Listing, contents: Contents) -> dict[str, Path]:
    """The sound deltas that are there and are not replaced, downloaded."""
    found = {}
    for name in listing.files:
        if "/" in name or not name.endswith(DELTA) or name in contents.deltas:
            continue
        try:
            path = fetch(listing, [name]) / name
            check_delta(path)
        except HubError:
            raise
        except DeltakitError as error:
            _log.warning("%s; the card does not tell of it", error)
        else:
            found[name] = path
    return found


def _stand(contents: Contents, listing: Listing) -> bool:
    """Whether no delta that is there is replaced by another."""
    there = [name for name in contents.deltas if name in listing.files]
    return all(is_recorded(contents.deltas[name], listing.files[name]) for name in there)


def _records(listing: Listing) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    names = [name for name in (METRICS, SETTINGS) if name in listing.files]
    folder = fetch(listing, names)
    metrics = parsed_metrics((folder / METRICS).read_bytes(), folder / METRICS)
    if SETTINGS not in names:
        return metrics, None
    return metrics, parsed_settings((folder / SETTINGS).read_bytes(), folder / SETTINGS)


def _previous(listing: Listing | None) -> str | None:
    if listing is None or CARD not in listing.files:
        return None
    try:
        return (fetch(listing, [CARD]) / CARD).read_text("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(
            f"{listing.pinned(CARD)} is not UTF-8 text, so that what was written there cannot be "
            "kept; mend or remove it first"
        ) from None
