"""Which files of a repository are meant: the delta, or the weights of a base and what describes them.

Weights are safetensors only, and no more of them than `deltakit.formats.checkpoint_files` would
read; pickles are never downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from deltakit.errors import ConfigError, FormatError
from deltakit.hub.listing import Listing

DELTA = ".sdelta"
WEIGHTS = ".safetensors"
INDEX = ".safetensors.index.json"
DESCRIPTION = (".json", ".txt", ".model", ".jinja")  # configuration, tokenizer, generation
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# A file that tells of another format, and those that may hold its numbers, the best first.
_FOREIGN = (
    ("adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")),
    ("manifest.json", ("patches.safetensors",)),
    ("pytorch_diff.bin", ()),
)


def delta_file(listing: Listing) -> str:
    """The path of the delta: the file named, `delta.sdelta`, or the only .sdelta file there.

    Raises ConfigError, which lists the deltas, where it is not clear which is meant, and HubError
    where there is none.
    """
    if listing.holds_file():
        return listing.location.path
    found = [name for name in listing.below() if name.endswith(DELTA)]
    usual = listing.join(f"delta{DELTA}")
    if usual in found:
        return usual
    if not found:
        raise listing.lack(f"no {DELTA} file{_below(listing)}")
    if len(found) > 1:
        raise which(listing, found)
    return found[0]


def is_delta(listing: Listing) -> bool:
    """Whether a delta stands there and no base; ConfigError where there are both."""
    if listing.holds_file():
        return listing.location.path.endswith(DELTA)
    names = listing.below()
    deltas = [name for name in names if name.endswith(DELTA)]
    weights = [name for name in names if name.endswith(WEIGHTS)]
    if deltas and weights:
        raise which(listing, [*deltas, *weights])
    return bool(deltas)


def foreign_files(listing: Listing, read: Callable[[str], bytes]) -> list[str]:
    """The files of what is to be converted: a delta, an adapter or patch of another format in a
    folder of its own, or a checkpoint; or the file named, with the JSON that describes it beside.

    read: as for `weight_files`. Pickles are among them where nothing else is there; deltakit reads
    these without unpickling. Raises ConfigError and HubError as `delta_file` and `weight_files` do.
    """
    path = listing.location.path
    if listing.holds_file():
        folder = path.rpartition("/")[0]
        beside = [_join(folder, name) for name, _ in _FOREIGN if name.endswith(".json")]
        return [path, *(name for name in beside if name in listing.files and name != path)]
    if any(name.endswith(DELTA) for name in listing.below()):
        return [delta_file(listing)]
    for mark, weights in _FOREIGN:
        found = [listing.join(name) for name in weights if listing.join(name) in listing.files]
        if listing.join(mark) in listing.files and (found or not weights):
            return [listing.join(mark), *found[:1]]
    return weight_files(listing, read)


def description_files(listing: Listing) -> list[str]:
    """Configuration, tokenizer and the like, below the location's folder or that of the index that it
    names; none for a lone file."""
    location = listing.location
    if listing.holds_file():
        if not location.path.endswith(INDEX):
            return []
        location = replace(location, path=location.path.rpartition("/")[0])
    names = replace(listing, location=location).below()
    return [name for name in names if name.endswith(DESCRIPTION)]


def weight_files(listing: Listing, read: Callable[[str], bytes]) -> list[str]:
    """The weight files, with their index if there is one.

    read: downloads a file and gives its bytes. Raises ConfigError, FormatError and HubError where
    there are none or where it is not clear which are meant.
    """
    path = listing.location.path
    if listing.holds_file() and not path.endswith((WEIGHTS, INDEX)):
        raise ConfigError(
            f"{listing.location}: a base is a {WEIGHTS} file, an index or a folder with either"
        )
    chosen = path if listing.holds_file() else _chosen(listing)
    if not chosen.endswith(INDEX):
        return [chosen]
    folder = chosen.rpartition("/")[0]
    try:
        names = set(json.loads(read(chosen))["weight_map"].values())
        shards = [_join(folder, name) for name in sorted(names, key=str.encode)]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FormatError(f"{listing.pinned(chosen)} is no index of weight files") from None
    for shard in shards:
        if shard not in listing.files:
            raise listing.lack(f"no {shard}, which {chosen} names")
    return [chosen, *shards]


def _chosen(listing: Listing) -> str:
    """As for a local folder: model.safetensors, its index, the only index, the only file."""
    folder = listing.location.path
    under = f"{folder}/" if folder else ""
    names = [name for name in listing.below() if "/" not in name[len(under) :]]
    for usual in (f"model{WEIGHTS}", f"model{INDEX}"):
        if under + usual in names:
            return under + usual
    for suffix in (INDEX, WEIGHTS):
        found = [name for name in names if name.endswith(suffix)]
        if len(found) > 1:
            raise which(listing, found)
        if found:
            return found[0]
    if any(name.endswith(_PICKLES) for name in names):
        raise listing.lack(
            f"no {WEIGHTS} file{_below(listing)}, only pickles, which deltakit never reads; convert "
            "it to safetensors first (model.save_pretrained(DIR) of transformers does)"
        )
    delta = "; it holds a delta" if any(name.endswith(DELTA) for name in names) else ""
    raise listing.lack(f"no {WEIGHTS} file{_below(listing)}{delta}")


def which(listing: Listing, found: list[str]) -> ConfigError:
    """The error where several files could be meant, which lists them."""
    named = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
    one = replace(listing.location, path=found[0])
    return ConfigError(f"{listing.location} holds {named}; name one, such as {one}")


def _below(listing: Listing) -> str:
    return f" in {listing.location.path}" if listing.location.path else ""


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
