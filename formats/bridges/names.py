"""From the names of a live model to those of its checkpoint, without the model."""

from __future__ import annotations

from collections.abc import Iterable

from deltakit.errors import CoordinateError, nearest
from deltakit.formats.checkpoint import Checkpoint


def checkpoint_names(
    live: Iterable[str], base: Checkpoint | None, optional: Iterable[str] = ()
) -> dict[str, str]:
    """Live name -> name in the checkpoint, by one rule for all of the names.

    The names themselves where the checkpoint has them all; otherwise the only prefix which, taken
    off ("model.layers.0.w" -> "layers.0.w") or put before those that the checkpoint lacks, gives
    names of the checkpoint. optional: names that the checkpoint may lack, such as those of a new
    head; they follow the same rule where it leads to a tensor, and stay as they are otherwise.
    Without a checkpoint the live names are the coordinates.

    Raises CoordinateError where no prefix does it, naming the nearest tensor, and where several do.
    """
    names, may_lack = list(live), list(optional)
    if base is None:
        return {name: name for name in (*names, *may_lack)}
    missing = [name for name in names if name not in base.tensors]
    rules = [("", "")] if not missing else _rules(missing, base)
    if not rules:
        ending = missing[0].rpartition(".")[2]
        hint = nearest(missing[0], [name for name in base.names if name.endswith(f".{ending}")])
        raise CoordinateError(
            f"{base.path} has no tensor {missing[0]!r}, with or without a prefix{hint}"
        )
    if len(rules) > 1:
        one, other = (_renamed(missing[0], *rule) for rule in rules[:2])
        raise CoordinateError(
            f"tensor {missing[0]!r} could be {one!r} or {other!r} in {base.path}; give the base "
            "that the file was made of"
        )
    found = {}
    for name in (*names, *may_lack):
        renamed = name if name in base.tensors else _renamed(name, *rules[0])
        found[name] = renamed if renamed in base.tensors else name
    _refuse_same(found, base)
    return found


def _refuse_same(found: dict[str, str], base: Checkpoint) -> None:
    stored: dict[str, str] = {}
    for live, name in found.items():
        if stored.setdefault(name, live) != live:
            raise CoordinateError(
                f"tensors {stored[name]!r} and {live!r} are both {name!r} in {base.path}; give the "
                "base that the file was made of"
            )


def _rules(missing: list[str], base: Checkpoint) -> list[tuple[str, str]]:
    """All (prefix to take off, prefix to put before) that lead every name to a tensor."""
    first = missing[0]
    rules = [(first[: -len(n)], "") for n in base.tensors if first.endswith(f".{n}")]
    rules += [("", n[: -len(first)]) for n in base.tensors if n.endswith(f".{first}")]
    return [rule for rule in rules if _leads(missing, rule, base)]


def _leads(missing: list[str], rule: tuple[str, str], base: Checkpoint) -> bool:
    off, _ = rule
    return all(n.startswith(off) and _renamed(n, *rule) in base.tensors for n in missing)


def _renamed(name: str, off: str, on: str) -> str:
    return on + name.removeprefix(off)
