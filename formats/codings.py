"""The table of index codings, and the choice among them: the smallest, per tensor."""

from __future__ import annotations

from deltakit.dtypes import Array
from deltakit.errors import FormatError, nearest
from deltakit.formats.bitmap import Bitmap
from deltakit.formats.coding import Coding, Offer, Place
from deltakit.formats.dense import Dense
from deltakit.formats.ranges import Columns, Rows, Runs
from deltakit.formats.rice import Rice
from deltakit.formats.seeded import Seeded
from deltakit.registry import Registry

CODINGS: Registry[type[Coding]] = Registry("index coding")
_add = CODINGS.register
_add("seeded", "nothing: a seed generates the support", "Salmon et al. 2011")(Seeded)
_add("dense", "nothing: every element is an entry")(Dense)
_add("rows", "coordinates of whole slices along the first axis")(Rows)
_add("columns", "coordinates of whole slices along the last axis")(Columns)
_add("runs", "starts and ends of runs of neighbours")(Runs)
_add("bitmap", "one bit per element")(Bitmap)
_add("rice", "Golomb-Rice coded gaps", "Golomb 1966; Rice and Plaunt 1971")(Rice)


def choose(indices: Array, place: Place) -> tuple[str, Offer]:
    """The name of the smallest coding for `indices` and its offer; the first of equals.

    A support with a seed is written as its seed. Raises FormatError when that seed does not
    generate it, because a reader would get other entries than the writer had.
    """
    if place.seed is not None:
        offer = Seeded.offer(indices, place)
        if offer is None:
            raise FormatError(
                f"{place.where}: seed {place.seed} does not generate these {place.count} indices; "
                "clear the seed to store them"
            )
        return "seeded", offer
    offers = ((record.name, record.target.offer(indices, place)) for record in CODINGS)
    possible = [(name, offer) for name, offer in offers if offer is not None]
    return min(possible, key=lambda item: item[1].size)


def decode(coding: str, data: bytes, place: Place) -> Array:
    """The indices that `data` holds in `coding`, int64 [count]; FormatError for anything else."""
    if coding not in CODINGS.names():
        raise FormatError(
            f"{place.where}: unknown index coding {coding!r}{nearest(coding, CODINGS.names())}; "
            "a newer deltakit may know it"
        )
    if (place.seed is not None) != (coding == "seeded"):
        raise FormatError(f"{place.where}: coding {coding!r} with seed {place.seed}")
    return CODINGS[coding].decode(data, place)
