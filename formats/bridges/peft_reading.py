"""Reading an adapter that PEFT saved as an adapter of deltakit: no change of weights is computed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deltakit.adapters.kind import Kind
from deltakit.delta import SparseDelta
from deltakit.dtypes import Array
from deltakit.errors import FormatError
from deltakit.formats.bridges.adalora_ranks import with_pruned_ranks
from deltakit.formats.bridges.adapter_entries import check_floats, from_constants
from deltakit.formats.bridges.bridge import Reading
from deltakit.formats.bridges.live_names import rule_between
from deltakit.formats.bridges.names import checkpoint_names
from deltakit.formats.bridges.peft_adapter import (
    PREFIX,
    Adapter,
    adapter_config,
    saved_whole,
    split_adapter,
)
from deltakit.formats.bridges.peft_heads import label_changes
from deltakit.formats.bridges.peft_recorded import from_seed, recorded
from deltakit.formats.bridges.peft_settings import check_start, config_of, record_of
from deltakit.formats.bridges.peft_shapes import check_factors, check_gains, is_turned
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.safetensors_file import SafetensorsFile
from deltakit.registry import Record

_BEGINNINGS = {
    "ADALORA": "lora_",
    "LOHA": "hada_",
    "VERA": "vera_lambda_",
}  # of other types it is their name
_MAGNITUDE = "lora_magnitude_vector"  # saved without the ".weight" that it has in a model
_DERIVED = {"delora_w_norm"}  # norms of the base's weights, which PEFT computes when it attaches


def read_as_adapter(path: Path, base: Checkpoint | None) -> Reading:
    """The adapter at `path`: its tensors as entries beyond constant initial values, or beyond those
    of the seed that the file records where deltakit wrote it.

    Raises FormatError for a type, settings or tensors that deltakit has no adapter for,
    CoordinateError where the base lacks a module.
    """
    settings = dict(adapter_config(path) or {})
    record = record_of(settings, path)
    check_start(settings, path)
    folder = split_adapter(path, _split_by(str(settings["peft_type"])), "tensors of its type")
    live = [f"{module}.weight" for module in folder.modules]
    strange = [key for key in folder.saved.values() if not key.startswith(PREFIX)]
    if strange:
        raise FormatError(f"{path}: {strange[0]!r} is a tensor of no module of the base's")
    names = checkpoint_names(live, base, folder.saved)
    modules = {m: names[f"{m}.weight"].removesuffix(".weight") for m in folder.modules}
    values, parameters = _values(folder, modules)
    if record.target.peft == "ADALORA":
        values = with_pruned_ranks(settings.pop("rank_pattern", None), modules, values, path)
        settings.pop("r", None)  # which AdaLoRA does not use
    config = config_of(record, settings, modules, path)
    _check_shapes(record, config, values, parameters, base)
    extras, notes = saved_whole(folder, names, base)
    metadata = folder.file.header.metadata if isinstance(folder.file, SafetensorsFile) else {}
    told = recorded(metadata)
    made = from_seed(record.name, config, told.adapter, values, base)
    adapter, tensors = made or from_constants(record.name, config, values, parameters)
    minus = sum(int((np.signbit(array) & (array == 0)).sum()) for array in values.values())
    if minus:
        notes.append(f"{minus:,} elements of -0.0 become 0.0")
    if base is None:
        notes.append("no base was given: modules are taken to have the same names in it")
    delta = SparseDelta(
        tensors=tensors,
        extras=extras,
        base=folder.identity(),
        config=told.config or label_changes(settings.get("task_type"), extras, base),
        provenance=_provenance(settings, {name: names[name] for name in live}),
        adapter=adapter,
    )
    return Reading(delta, tuple(notes))


def _split_by(peft_type: str) -> Any:
    """What tells a type's tensors: the last part of a key that begins as its parameters do."""
    beginning = _BEGINNINGS.get(peft_type, f"{peft_type.lower()}_")

    def split(live: str) -> tuple[str, str] | None:
        parts = live.split(".")
        at = [n for n, part in enumerate(parts) if n and part.startswith(beginning)]
        return (".".join(parts[: at[-1]]), ".".join(parts[at[-1] :])) if at else None

    return split


def _values(folder: Adapter, modules: Mapping[str, str]) -> tuple[dict[str, Array], dict[str, str]]:
    """By name of the tensor in the delta: values, all finite floats, and the parameter that it is."""
    values, parameters = {}, {}
    for module, keys in folder.modules.items():
        for part, key in keys.items():
            if part in _DERIVED:
                continue
            parameter = f"{part}.weight" if part == _MAGNITUDE else part
            name = f"{modules[module]}.{parameter}"
            if name in values:
                raise FormatError(f"{folder.file.path}: {key!r} stands there under two keys")
            values[name], parameters[name] = folder.array(key), parameter
    check_floats(values)
    return values, parameters


def _check_shapes(
    record: Record[Kind],
    config: dict[str, Any],
    values: Mapping[str, Array],
    parameters: Mapping[str, str],
    base: Checkpoint | None,
) -> None:
    """Check what can be told of the shapes, and put the layers' orientation into the config."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, array in values.items():
        module = name.removesuffix(f".{parameters[name]}")
        modules.setdefault(module, {})[parameters[name]] = array.shape
    if record.target.peft in ("LORA", "ADALORA"):
        check_factors(config, modules, base, magnitudes=bool(config.get("use_dora")))
        config["fan_in_fan_out"] = is_turned(modules, base, config["fan_in_fan_out"])
    elif record.target.peft == "IA3":
        check_gains(modules, base)


def _provenance(settings: Mapping[str, Any], live: Mapping[str, str]) -> dict[str, Any]:
    """What is needed to write the adapter for PEFT again."""
    found: dict[str, Any] = {}
    rule = rule_between(live)
    if all(rule(stored) == name for name, stored in live.items()):
        found["names"] = rule.as_dict()
    if isinstance(settings.get("task_type"), str):
        found["task_type"] = settings["task_type"]
    return {"peft": found}
