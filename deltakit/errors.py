"""The typed errors of deltakit.

Each message says what is wrong, where, what was expected and found, and what to do. The command
line prints it as one line and exits with 1. Every class also derives from the builtin that a
caller would expect, so `except ValueError` keeps working.
"""

from __future__ import annotations

from collections.abc import Sequence


class DeltakitError(Exception):
    """Base of every error that deltakit raises on purpose."""


class DeltaError(DeltakitError, ValueError):
    """The content of a delta breaks a rule of the data model (indices, values, shapes)."""


class FormatError(DeltakitError, ValueError):
    """A file is not what its format says it must be."""


class UnsupportedVersionError(FormatError):
    """A file was written by a version of the format that this reader does not know."""


class ChecksumError(FormatError):
    """The bytes of a file differ from the digest recorded when it was written."""


class BudgetError(DeltakitError, ValueError):
    """A budget cannot be read or cannot be met."""


class BaseMismatchError(DeltakitError, ValueError):
    """A delta is used on another base than the one it belongs to."""


class CoordinateError(DeltakitError, KeyError):
    """A tensor name or shape of one side does not exist on the other side."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ConfigError(DeltakitError, ValueError):
    """Settings that are unknown, contradict each other or lack something."""


class DataError(DeltakitError, ValueError):
    """Training or evaluation data that cannot be used."""


class TrainingError(DeltakitError, RuntimeError):
    """Training cannot go on (non-finite gradients, an optimizer used out of turn)."""


class MissingFileError(DeltakitError, FileNotFoundError):
    """A path given by the user does not exist or cannot be read."""


class JournalError(DeltakitError, RuntimeError):
    """A model, the journal of its in-place merges and what is asked for do not fit together."""


class OutputExistsError(DeltakitError, FileExistsError):
    """An output path exists and would be overwritten."""


class OutputError(DeltakitError, OSError):
    """An output cannot be written: the disk is full, the folder is read-only."""


class HubError(DeltakitError, OSError):
    """The Hugging Face Hub does not give what was asked for."""


class HubNotFoundError(HubError, MissingFileError):
    """A repository, revision or file is not on the Hub, or not for this user."""


class HubAccessError(HubError, PermissionError):
    """The Hub wants another token, or the repository's owner to be asked first."""


class HubConflictError(HubError):
    """Somebody else changed the same thing on the Hub meanwhile."""


class HubUnavailableError(HubError, ConnectionError):
    """The Hub is away, busy or not to be asked; the same command may work later."""


def nearest(name: str, known: Sequence[str], count: int = 3) -> str:
    """`"; nearest: a, b"` for an unknown name, or `""` when nothing is near."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=count, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""
