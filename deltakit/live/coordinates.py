"""Between live parameters and the tensors of the checkpoint they were loaded from.

A delta speaks of the checkpoint: its names, shapes and flat indices. A live model may carry a
prefix that the checkpoint lacks (a `BertModel` checkpoint in a classifier), or lack one;
transformers renames the modules of some architectures when it loads them (ViT) and fuses the
tensors of others (Mixtral's experts); and a checkpoint may hold both copies of a tied tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from deltakit.errors import ConfigError, CoordinateError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.live.conversion import saved_regions
from deltakit.live.offload import resident
from deltakit.live.plain_names import plain_names
from deltakit.live.regions import Region, turned, whole
from deltakit.quantized.layers import is_transposed, quantised_layers, stored_shape
from deltakit.quantized.stand_in import stand_ins

_OLD_ENDINGS = ((".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta"))
_CONFIG_KEYS = ("architectures", "id2label", "label2id", "problem_type", "vocab_size")


@dataclass(frozen=True)
class Coordinates:
    """Where a checkpoint holds a model's tensors.

    names: live name -> name in the checkpoint, None for what the checkpoint lacks, and the live
    name itself for tensors that the checkpoint holds in other shapes or more than once. regions:
    live name -> the parts of the checkpoint's tensors that make up such a tensor. dtypes: name in
    `names` -> dtype in the checkpoint; empty without one.
    """

    names: Mapping[str, str | None]
    regions: Mapping[str, Sequence[Region]] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def by_stored(self) -> dict[str, list[Region]]:
        """Name in the checkpoint -> regions, for the tensors that regions speak of."""
        found: dict[str, list[Region]] = {}
        for region in (region for regions in self.regions.values() for region in regions):
            found.setdefault(region.stored, []).append(region)
        return found

    @cached_property
    def live(self) -> dict[str, str]:
        """Name in `names`, or the live name for what the checkpoint lacks -> live name."""
        return {stored or name: name for name, stored in self.names.items()}

    @cached_property
    def stored(self) -> list[str]:
        """All names that deltas of this model may use."""
        return [n for n in self.live if n not in self.regions] + list(self.by_stored)


def find_checkpoint(model: torch.nn.Module) -> Checkpoint | None:
    """The local checkpoint that `from_pretrained` loaded the model from, where there is one."""
    path = getattr(model, "name_or_path", "")
    return Checkpoint(path) if path and Path(path).is_dir() else None


def open_base(
    model: torch.nn.Module, base: str | os.PathLike[str] | Checkpoint | None
) -> Checkpoint | None:
    """The checkpoint that a model was loaded from, as given, or as `find_checkpoint` finds it."""
    if base is None or isinstance(base, Checkpoint):
        return base or find_checkpoint(model)
    return Checkpoint(os.fspath(base))


def saved_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Live name -> buffer, for the buffers that checkpoints hold (BatchNorm statistics)."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def live_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All that a checkpoint of the model holds, by live name: parameters, then saved buffers.

    For weights that accelerate keeps in host memory, the tensors there (see `live.offload`); for
    quantised ones, what stands for them (`quantized.stand_in`).
    """
    found = {**dict(model.named_parameters()), **saved_buffers(model)}
    return {n: resident(model, n, tensor) for n, tensor in found.items()} | stand_ins(model)


def plain_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`live_tensors` without those of adapters, by the names that they have without adapters."""
    plain = plain_names(model)
    named = [(plain(name), tensor) for name, tensor in live_tensors(model).items()]
    return {name: tensor for name, tensor in named if name is not None}


def plain_coordinates(model: torch.nn.Module, checkpoint: Checkpoint | None) -> Coordinates:
    """`coordinates` of parameters and saved buffers by the names of `plain_tensors`.

    They stay what they are while adapters come and go.
    """
    where, plain = coordinates(model, checkpoint, buffers=True), plain_names(model)
    names, regions = {}, {}
    for live, stored in where.names.items():
        name = plain(live)
        if name is None:
            continue
        names[name] = name if live in where.regions else stored
        if live in where.regions:
            regions[name] = [region.moved(name, region.stored) for region in where.regions[live]]
    dtypes = {
        plain(name) or name if name in where.regions else name: d
        for name, d in where.dtypes.items()
    }
    return Coordinates(names, regions, dtypes)


def checkpoint_names(
    model: torch.nn.Module, checkpoint: Checkpoint | None, *, buffers: bool = False
) -> dict[str, str | None]:
    """The names of `coordinates`."""
    return dict(coordinates(model, checkpoint, buffers=buffers).names)


def coordinates(
    model: torch.nn.Module, checkpoint: Checkpoint | None, *, buffers: bool = False
) -> Coordinates:
    """Where `checkpoint` holds the model's parameters (and saved buffers, if asked).

    In the model's order, tied ones once. Without a checkpoint the live names are the coordinates.
    The base's tensors have the names that they would have without the adapters in the model.
    Raises CoordinateError where names match and shapes differ.
    """
    live = dict[str, torch.Tensor](model.named_parameters())
    if buffers:
        live |= saved_buffers(model)
    plain = plain_names(model)
    if checkpoint is None:
        return Coordinates({name: plain(name) or name for name in live})
    copies = {
        name: [known for copy in same if (known := plain(copy)) is not None]
        for name, same in _all_names(model, live).items()
    }
    quantised = {n: each for n, each in quantised_layers(model).items() if n in live}
    live |= {n: torch.empty(stored_shape(e), device="meta") for n, e in quantised.items()}
    every = {name: tensor for first, tensor in live.items() for name in copies[first]}
    saved = saved_regions(model, every) if hasattr(model, "save_pretrained") else {}
    places = _Places(checkpoint, getattr(model, "base_model_prefix", ""), saved)
    names: dict[str, str | None] = {}
    regions, dtypes = {}, {}
    for name, tensor in live.items():
        found = places.regions(name, copies[name]) or places.wholes(name, copies[name], tensor)
        if not found:
            names[name] = None
        elif name in quantised and is_transposed(quantised[name]):
            names[name] = name
            regions[name] = [turned(name, each.stored, each.stored_shape) for each in found]
        elif len(found) == 1 and found[0].is_whole:
            names[name] = found[0].stored
        else:
            names[name], regions[name] = name, found
        if found:
            dtypes[names[name] or name] = places.dtype(name, found)
    return Coordinates(names, regions, dtypes)


def _all_names(model: torch.nn.Module, live: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Live name -> all names of the same tensor, itself first."""
    first = {id(tensor): name for name, tensor in live.items()}
    found = {name: [name] for name in live}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in found[first[id(parameter)]]:
            found[first[id(parameter)]].append(name)
    return found


def refuse_rearranged(extras: Sequence[str], where: Coordinates) -> None:
    """Raise ConfigError for extras that the checkpoint does not hold as whole tensors."""
    for name in extras:
        if name in where.regions:
            raise ConfigError(
                f"tensor {name!r} is held rearranged by the checkpoint (such as in "
                f"{where.regions[name][0].stored!r}) and cannot be an extra; train entries of it"
            )


class _Places:
    """Looks names up in a checkpoint that may have been saved by another class or version."""

    def __init__(
        self, checkpoint: Checkpoint, prefix: str, saved: Mapping[str, Sequence[Region]]
    ) -> None:
        self.checkpoint, self.prefix = checkpoint, prefix
        self.new_names: dict[str, str] = {}  # of tensors that are saved whole under another name
        self.parts: dict[str, list[Region]] = {}
        for stored, regions in saved.items():
            for region in regions:
                if len(regions) == 1 and region.is_whole:
                    self.new_names[region.live] = stored
                else:
                    self.parts.setdefault(region.live, []).append(region)

    def regions(self, name: str, copies: Sequence[str]) -> list[Region]:
        """The regions of a tensor that is not saved whole; [] when the checkpoint has none."""
        parts = [part for copy in copies for part in self.parts.get(copy, [])]
        found = [self._find([part.stored]) for part in parts]
        if not any(found):
            return []
        for part, stored in zip(parts, found, strict=True):
            if stored is None:
                raise CoordinateError(
                    f"live tensor {name!r} is made of several tensors of the checkpoint, but "
                    f"{self.checkpoint.path} lacks {part.stored!r}; is it complete?"
                )
            self._check_shape(name, part.stored_shape, stored)
        return [part.moved(name, s) for part, s in zip(parts, found, strict=True) if s is not None]

    def wholes(self, name: str, copies: Sequence[str], tensor: torch.Tensor) -> list[Region]:
        """The tensors of the checkpoint that hold all of a live tensor, one per copy in there."""
        shape = tuple(tensor.shape)
        wanted = [self._find([copy, self.new_names.get(copy, copy)]) for copy in copies]
        stored = [s for s in dict.fromkeys(wanted) if s is not None]
        for each in stored:
            self._check_shape(name, shape, each)
        return [whole(name, each, shape) for each in stored]

    def dtype(self, name: str, found: Sequence[Region]) -> str:
        """The dtype of the tensors that hold a live tensor."""
        dtypes = {self.checkpoint.tensors[each.stored].dtype: each.stored for each in found}
        if len(dtypes) > 1:
            kinds = ", ".join(f"{stored!r} ({dtype})" for dtype, stored in dtypes.items())
            raise CoordinateError(
                f"live tensor {name!r} is made of tensors of several dtypes in "
                f"{self.checkpoint.path}: {kinds}; save the checkpoint in one dtype"
            )
        return next(iter(dtypes))

    def _check_shape(self, name: str, shape: tuple[int, ...], stored: str) -> None:
        found = self.checkpoint.tensors[stored].shape
        if found != shape:
            raise CoordinateError(
                f"live tensor {name!r} has shape {list(shape)}, but {stored!r} in the checkpoint "
                f"has {list(found)}; load the model as its checkpoint describes it"
            )

    def _find(self, names: Sequence[str]) -> str | None:
        candidates = list(dict.fromkeys(names))
        if self.prefix:
            candidates += [name.removeprefix(f"{self.prefix}.") for name in names]
            candidates += [f"{self.prefix}.{name}" for name in names]
        for new, old in _OLD_ENDINGS:
            candidates += [c.removesuffix(new) + old for c in candidates if c.endswith(new)]
        return next((c for c in candidates if c in self.checkpoint.tensors), None)


def config_changes(model: torch.nn.Module, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """What a config.json must say so that the model's class and head are loaded again.

    Empty for models without a config and for bases without a config.json.
    """
    config: Any = getattr(model, "config", None)
    if checkpoint is None or checkpoint.directory is None or not hasattr(config, "to_dict"):
        return {}
    path = Path(os.fspath(checkpoint.directory)) / "config.json"
    if not path.is_file():
        return {}
    old: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    new = json.loads(json.dumps(config.to_dict()))
    new["architectures"] = [type(model).__name__]
    return {key: new[key] for key in _CONFIG_KEYS if key in new and new[key] != old.get(key)}
