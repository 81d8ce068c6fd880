"""What can go wrong while writing to the Hub, as typed errors of one line that say what to do."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from deltakit.errors import (
    DeltakitError,
    HubAccessError,
    HubConflictError,
    HubError,
    HubNotFoundError,
    HubUnavailableError,
)
from deltakit.hub.failures import endpoint, explanation, status_of
from deltakit.hub.location import Location

_QUERY = re.compile(r"\?\S+")


@contextmanager
def writing(location: Location) -> Iterator[None]:
    """Turn whatever the client raises while it writes to `location` into one of deltakit's errors.

    Meanwhile addresses in its log lose their query: those of uploads are signed, so that whoever
    reads the log could use them.
    """
    log = logging.getLogger("huggingface_hub.utils._http")
    log.addFilter(_without_signatures)
    try:
        yield
    except DeltakitError:
        raise
    except Exception as error:
        told = _refusal(error, location)
        if told is None:
            raise
        raise told from None
    finally:
        log.removeFilter(_without_signatures)


def _without_signatures(record: logging.LogRecord) -> bool:
    record.msg = _QUERY.sub("", str(record.msg))
    return True


def _refusal(error: Exception, location: Location) -> Exception | None:
    from huggingface_hub import errors

    cause, status = error.__cause__, status_of(error)
    if isinstance(error, RuntimeError) and isinstance(cause, Exception):
        return _refusal(cause, location)  # the client's wrapper around what broke an upload
    if type(error) is ValueError and status_of(cause) == 400:
        return HubError(
            f"{location}: the Hub refuses the metadata of README.md; mend what stands between its "
            "first two lines of ---"
        )
    if status is None and isinstance(error, ValueError) and not isinstance(error, UnicodeError):
        return HubUnavailableError(
            f"{location}: {endpoint()} does not answer as a Hub does, or does not take these files; "
            "check HF_ENDPOINT and your proxy, and try again"
        )
    if status is None and isinstance(error, (RuntimeError, OSError)):  # of the upload by hf_xet
        if isinstance(error, errors.OfflineModeIsEnabled):
            return explanation(error, location)
        if isinstance(error, OSError) and error.errno is not None:
            return None  # of this machine's files, which the system tells better
        return HubUnavailableError(
            f"{location}: the upload broke off; run the same command again, or with "
            "HF_HUB_DISABLE_XET=1 to take another way"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubNotFoundError(
            f"{location}: the Hub shows you no repository {location.repo}; check its name, and that "
            "you are logged in (hf auth login, or HF_TOKEN) as somebody who may write to it"
        )
    return _by_status(status, location) or explanation(error, location)


def _by_status(status: int | None, location: Location) -> HubError | None:
    if status == 401:
        return HubAccessError(
            f"{location}: the Hub does not accept your token (401); log in again (hf auth login, or "
            "HF_TOKEN) with a token that may write"
        )
    if status == 403:
        return HubAccessError(
            f"{location}: your token may not write there (403); it needs the role write, in a "
            f"name that is yours or your organisation's: make one on {endpoint()}/settings/tokens, "
            "then log in with it (hf auth login, or HF_TOKEN)"
        )
    if status in (402, 507):
        return HubAccessError(
            f"{location}: the Hub has no room for this ({status}); free storage of its owner, or "
            "ask for more"
        )
    if status in (409, 412):
        return HubConflictError(
            f"{location}: it was changed while it was written to ({status}); run the same command "
            "again"
        )
    return None
