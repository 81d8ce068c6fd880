"""From the names of a live model to those of its checkpoint, without the model."""

from __future__ import annotations

from collections.abc import Iterable

from deltakit.errors import CoordinateError, nearest
from deltakit.formats.checkpoint import Checkpoint


def checkpoint_names(live: Iterable[str], base: Checkpoint | None) -> dict[str, str]:
    """Live name -> name in the checkpoint, by one rule for all of the names.

    The names themselves where the checkpoint has them all; otherwise the only prefix which, taken
    off all of them ("model.layers.0.w" -> "layers.0.w") or put before all of them, gives names of
    the checkpoint. Names without a prefix to take off (a head beside "bert.…") must be there as
    they are. Without a checkpoint the live names are the coordinates. Raises CoordinateError where
    no prefix does it, naming the nearest tensor, and where several do.
    """
    names = list(live)
    if base is None or all(name in base.tensors for name in names):
        return {name: name for name in names}
    found = [made for made in _candidates(names, base) if set(made.values()) <= set(base.tensors)]
    if len(found) == 1:
        return found[0]
    missing = next(name for name in names if name not in base.tensors)
    if found:
        raise CoordinateError(
            f"tensor {missing!r} could be {found[0][missing]!r} or {found[1][missing]!r} in "
            f"{base.path}; give the base that the file was made of"
        )
    ending = missing.rpartition(".")[2]
    hint = nearest(missing, [name for name in base.names if name.endswith(f".{ending}")])
    raise CoordinateError(f"{base.path} has no tensor {missing!r}, with or without a prefix{hint}")


def _candidates(names: list[str], base: Checkpoint) -> list[dict[str, str]]:
    """Every renaming by one prefix that could fit the first name that the checkpoint lacks."""
    first = next(name for name in names if name not in base.tensors)
    made = []
    for stored in base.tensors:
        if first.endswith(f".{stored}"):
            prefix = first[: -len(stored)]
            made.append({n: n if n in base.tensors else n.removeprefix(prefix) for n in names})
        elif stored.endswith(f".{first}"):
            prefix = stored[: -len(first)]
            made.append({n: n if n in base.tensors else prefix + n for n in names})
    return [m for m in made if len(set(m.values())) == len(m)]
