"""What can go wrong with the Hub, as typed errors of one line that say what to do.

Messages are made here from a status or the kind of an exception, never of the client's own text,
which may quote headers and signed addresses. So no token can be in them.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from deltakit.errors import (
    DeltakitError,
    HubAccessError,
    HubError,
    HubNotFoundError,
    HubUnavailableError,
    OutputError,
)
from deltakit.hub.location import Location

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0)  # seconds before a request is tried again
LONGEST_WAIT = 30.0  # seconds that a Hub may ask for
_LOG_IN = "log in (hf auth login, or HF_TOKEN) as somebody who may read it"


@contextmanager
def explained(location: Location) -> Iterator[None]:
    """Turn whatever the client raises about `location` into one of deltakit's errors."""
    try:
        yield
    except DeltakitError:
        raise
    except Exception as error:
        told = explanation(error, location)
        if told is None:
            raise
        raise told from None


def patiently(call: Callable[[], T], waits: Sequence[float] | None = None) -> T:
    """The result of a request that only reads, tried again while the Hub is busy or away.

    waits: seconds before each further try, `WAITS` by default; a longer Retry-After is kept to.
    """
    for wait in WAITS if waits is None else waits:
        try:
            return call()
        except Exception as error:
            if not _passes(error):
                raise
            time.sleep(min(max(wait, _asked_wait(error)), LONGEST_WAIT))
    return call()


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status that the client's error is about; None where it is about none."""
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _passes(error: Exception) -> bool:
    status = status_of(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return _is_of_the_network(error)


def _is_of_the_network(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    http_error = HfHubHTTPError.__mro__[1]  # of the HTTP library that this release is built on
    return isinstance(error, http_error) and not isinstance(error, OfflineModeIsEnabled)


def _asked_wait(error: Exception) -> float:
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return float(headers.get("Retry-After", 0))
    except ValueError:  # a date
        return 0.0


def explanation(error: Exception, location: Location) -> Exception | None:
    """The error that tells what the client's error means for somebody who reads; None: unknown."""
    from huggingface_hub import errors

    page = f"{endpoint()}/{location.repo}"
    if isinstance(error, errors.GatedRepoError):
        return HubAccessError(f"{location} is gated: ask for access on {page}, then {_LOG_IN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubNotFoundError(
            f"{location}: the Hub shows no repository {location.repo}; check the name, or {_LOG_IN} "
            "if it is private"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubNotFoundError(
            f"{location}: {location.repo} has no revision {location.revision!r}; give a branch, a "
            f"tag or a whole commit id of {page}"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return offline(location)
    if isinstance(error, errors.LocalEntryNotFoundError):  # of the client, after its own tries
        cause = error.__cause__
        found = explanation(cause, location) if isinstance(cause, Exception) else None
        return found or _unreachable(location)
    if isinstance(error, errors.EntryNotFoundError):
        return HubNotFoundError(f"{location}: no such file; {page} lists what is there")
    if isinstance(error, UnicodeEncodeError) or type(error).__name__ == "LocalProtocolError":
        return HubAccessError(
            f"{location}: the token (HF_TOKEN, or of hf auth login) is none: it holds characters "
            "that no token has; set it anew"
        )
    status = status_of(error)
    if status is not None:
        return _refused(status, location)
    if _is_of_the_network(error):
        return _unreachable(location)
    if isinstance(error, errors.FileMetadataError):
        return HubError(
            f"{location}: {endpoint()} does not answer as a Hub does; check HF_ENDPOINT and "
            "your proxy"
        )
    return _of_the_system(error, location) if isinstance(error, OSError) else None


def endpoint() -> str:
    """The address of the Hub, without a name and password that may stand in it."""
    from huggingface_hub import constants

    return re.sub(r"//[^/]*@", "//", constants.ENDPOINT)


def _refused(status: int, location: Location) -> HubError:
    if status == 401:
        return HubAccessError(
            f"{location}: the Hub does not accept your token (401); log in again (hf auth login, or "
            "HF_TOKEN), or log out to read what is public"
        )
    if status == 403:
        return HubAccessError(
            f"{location}: your token may not read this (403); give it the right to read this "
            f"repository, or {_LOG_IN}"
        )
    if status == 429:
        return HubUnavailableError(
            f"{location}: too many requests (429); try again in some minutes, logged in (hf auth "
            "login) for a higher limit"
        )
    if status >= 500:
        return HubUnavailableError(
            f"{location}: the Hub has a problem of its own ({status}); try again later"
        )
    return HubError(f"{location}: the Hub refused the request ({status})")


def _unreachable(location: Location) -> HubUnavailableError:
    return HubUnavailableError(
        f"{location}: {endpoint()} cannot be reached, or the connection was lost; check your "
        "network, proxy and HF_ENDPOINT, and try again"
    )


def offline(location: Location, what: str = "it") -> HubUnavailableError:
    """The error where something is needed that the cache lacks while HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return HubUnavailableError(
        f"{location}: offline mode is on (HF_HUB_OFFLINE) and the cache {constants.HF_HUB_CACHE} "
        f"lacks {what}; run once without it"
    )


def no_space(location: Location) -> OutputError:
    """The error where the disk of the cache is full."""
    from huggingface_hub import constants

    return OutputError(
        f"{location}: no space left for the download in {constants.HF_HUB_CACHE}; free some, or "
        "set HF_HOME to a folder on another disk"
    )


def _of_the_system(error: OSError, location: Location) -> Exception:
    from huggingface_hub import constants

    if error.errno is None:  # the client's own check of the size
        return HubUnavailableError(
            f"{location}: the download ended before its last byte; run the same command again"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space(location)
    return OutputError(
        f"{location}: cannot keep the download in {constants.HF_HUB_CACHE}: "
        f"{(error.strerror or '').lower()}; mend that, or set HF_HOME to another folder"
    )
