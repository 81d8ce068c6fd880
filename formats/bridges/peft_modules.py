"""Adapters of PEFT as adapters of deltakit, both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from deltakit.adapter import Adapter
from deltakit.adapters.fold_delta import computed_from
from deltakit.adapters.initial import STORED, all_initial_values, trained_values
from deltakit.adapters.kinds import KINDS
from deltakit.delta import BaseIdentity, SparseDelta
from deltakit.dtypes import Array
from deltakit.errors import ConfigError
from deltakit.formats import strict_json
from deltakit.formats.atomic_folder import replacing_folder
from deltakit.formats.bridges import container
from deltakit.formats.bridges.bridge import BRIDGES, Bridge, Options, Reading
from deltakit.formats.bridges.live_names import live_names
from deltakit.formats.bridges.peft_adapter import (
    CONFIG,
    PICKLED,
    PREFIX,
    WEIGHTS,
    adapter_config,
)
from deltakit.formats.bridges.peft_heads import label_changes, saved_keys
from deltakit.formats.bridges.peft_reading import read_as_adapter
from deltakit.formats.bridges.peft_recorded import metadata_of
from deltakit.formats.bridges.peft_settings import renamed
from deltakit.formats.checkpoint import Checkpoint

_OF_OTHER_BRIDGES = {"LORA", "SHIRA", "SUPERTUNING", "SFT", "ROSA"}
_SAVED_AS = {"lora_magnitude_vector.weight": "lora_magnitude_vector"}  # parameter -> end of a key


@BRIDGES.register(
    "peft-adapter", "PEFT's adapters, kept as adapters (LoRA, DoRA, AdaLoRA, IA3, ...)", "PEFT 0.21"
)
class PeftAdapter(Bridge):
    """A folder with adapter_config.json and `<module>.<parameter>` in adapter_model.safetensors.

    Reads all types of adapters that deltakit can attach, LoRA by way of `peft-lora`; writes those
    of PEFT's kinds, with all values, so that PEFT needs neither seed nor deltakit.
    """

    name = "peft-adapter"
    holds = "adapters"

    def recognise(self, path: Path) -> str | None:
        settings = adapter_config(path)
        folder = path if path.is_dir() else path.parent
        named = None if settings is None else settings.get("peft_type")
        if not isinstance(named, str) or named in _OF_OTHER_BRIDGES:
            return None
        saved = any((folder / name).is_file() for name in (WEIGHTS, PICKLED))
        return f"PEFT {named} adapter" if saved else None

    def read(self, path: Path, *, base: Checkpoint | None, options: Options) -> Reading:
        return read_as_adapter(path, base)

    def write(
        self, delta: SparseDelta, path: Path, *, base: Checkpoint | None, options: Options
    ) -> tuple[str, ...]:
        adapter = delta.adapter
        assert adapter is not None  # by `holds`
        _refuse_others(adapter)
        values, config = _values_and_config(delta, adapter, base)
        places = {name: adapter.split(name) for name in values}
        modules = sorted({module for module, _ in places.values()})
        heads = {n: a for n, a in delta.extras.items() if not n.startswith(STORED)}
        live, notes = live_names(delta, [*modules, *heads], base, options.prefix)
        keys, saved = saved_keys({n: live[n] for n in heads}, {live[m] for m in modules})
        arrays = {f"{PREFIX}{keys[name]}": array for name, array in heads.items()}
        for name, (module, parameter) in places.items():
            end = _SAVED_AS.get(parameter, parameter)
            arrays[f"{PREFIX}{live[module]}.{end}"] = values[name]
        config = renamed(config, {module: live[module] for module in modules}, path)
        told = delta.provenance.get("peft")
        task = told.get("task_type") if isinstance(told, Mapping) else None
        settings = {
            **config,
            "peft_type": KINDS[adapter.kind].peft,
            "task_type": task,
            "target_modules": _targets([live[module] for module in modules], config),
            "modules_to_save": saved or None,
        }
        metadata = metadata_of(delta, label_changes(task, heads, base))
        with replacing_folder(path) as folder:
            (folder / CONFIG).write_text(_rendered(settings, delta.base), encoding="utf-8")
            (folder / WEIGHTS).write_bytes(container.encode(arrays, metadata))
        return (*notes, *_lost(delta))


def _refuse_others(adapter: Adapter) -> None:
    """Raise ConfigError for an adapter that PEFT has not, or would build otherwise."""
    if not KINDS[adapter.kind].peft:
        why = "is none of PEFT's"
    elif adapter.config.get("frozen"):
        why = "holds values drawn from the delta's seed, which PEFT would draw otherwise"
    else:
        return
    raise ConfigError(
        f"adapter {adapter.kind!r} {why}; --to adapter-modules writes it as plain tensors"
    )


def _rendered(settings: Mapping[str, Any], base: BaseIdentity | None) -> str:
    known = base or BaseIdentity()
    named = {"base_model_name_or_path": known.model_id, "revision": known.revision}
    return strict_json.dumps({**settings, **named, "inference_mode": True}) + "\n"


def _targets(modules: list[str], config: Mapping[str, Any]) -> list[str] | str:
    """The adapted modules by their names; as one expression for IA3, which else wants those of the
    feed-forward to be repeated in full."""
    if "feedforward_modules" not in config:
        return modules
    return "|".join(re.escape(module) for module in modules)


def _values_and_config(
    delta: SparseDelta, adapter: Adapter, base: Checkpoint | None
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The values to save, by tensor, and the settings of their modules."""
    computed = computed_from(delta, base)
    values, config = trained_values(delta, computed), dict(adapter.config)
    if not any("stored" in rule for rule in adapter.initial.values()):
        return values, config
    return _without_start(adapter, values, all_initial_values(delta, computed), config)


def _without_start(
    adapter: Adapter,
    values: Mapping[str, Array],
    initial: Mapping[str, Array],
    config: dict[str, Any],
) -> tuple[dict[str, Array], dict[str, Any]]:
    """An adapter whose start was taken off the base (PiSSA, LoftQ), as one of the base itself: by
    factors of twice the rank, as PEFT does it, [B, -B'] [A; A'] = B A - B' A'."""
    axes = {"lora_A.weight": 0, "lora_embedding_A": 0, "lora_B.weight": 1, "lora_embedding_B": 1}
    if not set(adapter.initial) <= set(axes):
        others = ", ".join(sorted(set(adapter.initial) - set(axes)))
        raise ConfigError(
            f"adapter {adapter.kind!r} started from values taken off the base and has {others}, so "
            "PEFT cannot have it beside the base itself; deltakit merge folds it"
        )
    joined = {}
    for name, array in values.items():
        axis = axes[adapter.split(name)[1]]
        joined[name] = np.concatenate([array, initial[name] * (-1) ** axis], axis)
    alpha = sqrt(2) if config.get("use_rslora") else 2
    for setting, factor in (("r", 2), ("lora_alpha", alpha)):
        config[setting] *= factor
    for setting, factor in (("rank_pattern", 2), ("alpha_pattern", alpha)):
        config[setting] = {k: v * factor for k, v in (config.get(setting) or {}).items()}
    return joined, {k: v for k, v in config.items() if not k.startswith(("init_", "loftq_"))}


def _lost(delta: SparseDelta) -> tuple[str, ...]:
    notes = []
    if any(name.startswith(STORED) for name in delta.extras):
        notes.append(
            "the adapter's start was taken off the base: it is written with twice the rank, for the "
            "full-precision base as it is"
        )
    if any(tensor.order is not None for tensor in delta.tensors.values()):
        notes.append("the order of unmasking is lost")
    if delta.config:
        notes.append(
            "PEFT does not change config.json: load the base with what the delta's head needs "
            f"({', '.join(sorted(delta.config))})"
        )
    return tuple(notes)
