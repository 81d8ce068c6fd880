"""Which tensors of a saved state dict are the model, and what they are called there.

A training checkpoint holds more than weights: {"model": ..., "optimizer": ..., "step": ...}, perhaps
one level deeper under the key of a trainer. Tensors are grouped by the keys that lead to the dict in
which they stand, and one group is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deltakit.errors import FormatError

MODEL = "model"
_OPTIMIZER_KEYS = {"state", "param_groups"}  # of the state dict of every torch optimizer
Keys = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Chosen:
    """keys: that lead to the model. names: of its tensors there -> in the whole checkpoint."""

    keys: Keys
    names: Mapping[str, str]


def choose(paths: Mapping[str, Keys], part: str | None, what: str) -> Chosen:
    """The tensors of the model among those that were saved.

    paths: name of each tensor -> the keys that lead to it. part: the keys that lead to the model,
    joined by dots ("" for the top level), or None to find out: the only group that is no optimizer,
    else the only one whose last key is "model". what: names the checkpoint in messages.
    Raises FormatError, with the groups to choose from, where that is not clear.
    """
    groups: dict[Keys, dict[str, str]] = {}
    for name, path in paths.items():
        if groups.setdefault(path[:-1], {}).setdefault(path[-1], name) != name:
            raise FormatError(f"{what} holds two tensors under {'.'.join(path)!r}")
    candidates = {keys: names for keys, names in groups.items() if not _is_optimizer(keys, names)}
    if part is not None:
        found = [keys for keys in groups if ".".join(keys) == part]
    else:
        found = list(candidates)
        if len(found) > 1:
            found = [keys for keys in found if keys[-1:] == (MODEL,)]
    if len(found) != 1:
        raise FormatError(_unclear(candidates or groups, part, what))
    return Chosen(found[0], groups[found[0]])


def _is_optimizer(keys: Keys, names: Mapping[str, str]) -> bool:
    """Whether these are states of an optimizer, told by its keys or by those that lead there."""
    if any("optim" in key.lower() or key in _OPTIMIZER_KEYS for key in keys):
        return True
    return all(name.partition(".")[0] in _OPTIMIZER_KEYS for name in names)


def _unclear(candidates: Mapping[Keys, object], part: str | None, what: str) -> str:
    if not candidates:
        return f"{what} holds no tensors"
    known = sorted(".".join(keys) for keys in candidates)
    listed = ", ".join(repr(each) for each in known[:8]) + (", ..." if len(known) > 8 else "")
    if part is not None:
        return f"{what} holds no tensors under {part!r}; it has {listed}"
    return (
        f"{what} holds several groups of tensors that may be the model: {listed}; say which one "
        f"behind a #, such as {what}#{known[-1]}"
    )
