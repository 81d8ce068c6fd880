"""The adapter_config.json of PEFT, and what deltakit's adapters record of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any

from deltakit.adapters.kind import Kind
from deltakit.adapters.kinds import KINDS
from deltakit.adapters.peft_kinds import REFUSED
from deltakit.errors import FormatError
from deltakit.registry import Record

# Settings of where an adapter stands (its tensors tell that) and of how it was made and trained.
_OF_NO_MODULE = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
    *("revision", "task_type"),
    *("bias", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save"),
    *("megatron_config", "megatron_core", "qalora_group_size", "target_modules"),
    *("eva_config", "init_ia3_weights", "init_lora_weights", "init_weights"),
    *("beta1", "beta2", "deltaT", "orth_reg_weight", "target_r", "tfinal", "tinit"),
}
_DRAWN = ("FOURIERFT", "VERA")
_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # that leave the base as it is


def record_of(settings: Mapping[str, Any], where: object) -> Record[Kind]:
    """The kind of adapter that an adapter_config.json speaks of: the one of its type; of several,
    the one that has what they always hold (`use_dora`) as it is set.

    Raises FormatError for a type that deltakit lacks.
    """
    named = settings.get("peft_type")
    found = [record for record in KINDS if record.target.peft and record.target.peft == named]
    if not found:
        why = REFUSED.get(str(named).lower().replace("_", "-"))
        known = ", ".join(dict.fromkeys(r.target.peft for r in KINDS if r.target.peft))
        raise FormatError(
            f"{where}: an adapter of PEFT's type {named!r} is none that deltakit attaches"
            + (f": {why}" if why else f"; it knows {known}")
        )
    if named in _DRAWN:
        raise FormatError(
            f"{where}: {named} holds random values that PEFT draws from torch when it loads the "
            "adapter; deltakit draws them from a seed of its own, so it cannot be converted"
        )
    if len(found) == 1:
        return found[0]
    fitting = [r for r in found if all(settings.get(k) == v for k, v in r.target.fixed.items())]
    return max(fitting, key=lambda record: len(record.target.fixed))


def check_start(settings: Mapping[str, Any], where: object) -> None:
    """Raise FormatError for adapters whose beginning changed the base (PiSSA, LoftQ), or what they
    compute (MiSS)."""
    start = settings.get("init_lora_weights", True)
    if start not in _STARTS:
        raise FormatError(
            f"{where}: init_lora_weights {start!r} changes the base before training; save "
            "the adapter with path_initial_model_for_weight_conversion, then convert it"
        )
    if settings.get("peft_type") == "MISS" and isinstance(settings.get("init_weights"), str):
        raise FormatError(
            f"{where}: init_weights {settings['init_weights']!r} is a variant of MiSS that deltakit "
            "does not have; it cannot be converted"
        )


def config_of(
    record: Record[Kind], settings: Mapping[str, Any], modules: Mapping[str, str], where: object
) -> dict[str, Any]:
    """What a delta's adapter records: the kind's fields, as given or by default.

    modules: live name of an adapted module -> its name in the checkpoint, which patterns speak of
    then. Raises FormatError for values of another type than the default's, and for settings that are
    switched on without the kind having a field for them: they might change what modules compute.
    """
    kind = record.target
    config = {**kind.fields, **kind.fixed}
    for name, default in kind.fields.items():
        if settings.get(name) is not None:
            config[name] = _checked(settings[name], default, f"{where}: {name}")
    for name, value in settings.items():
        if name not in config and name not in _OF_NO_MODULE and value:
            raise FormatError(
                f"{where}: {name} {value!r} is nothing that deltakit's adapter {record.name!r} "
                "has; it cannot be converted"
            )
    return renamed(config, modules, where)


def renamed(config: Mapping[str, Any], modules: Mapping[str, str], where: object) -> dict[str, Any]:
    """The configuration with what it says of modules said of their new names: old -> new."""
    made = dict(config)
    for name, value in config.items():
        if name.endswith("_pattern") and value:
            made[name] = _relocated(value, modules, f"{where}: {name}")
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            made[name] = sorted(modules.get(item, item) for item in value)
    return made


def first_match(patterns: Mapping[str, Any], module: str, what: str) -> Any:
    """What the first pattern gives that the end of a module's name matches, as in PEFT; None
    without one. Raises FormatError for what is no regular expression."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise FormatError(f"{what}: {error} in a pattern") from None
    return None


def _checked(value: Any, default: Any, what: str) -> Any:
    numbers = (int, float)
    if type(default) in numbers and type(value) in numbers:
        if isfinite(value):
            return value
    elif default is None or type(value) is type(default):
        return value
    raise FormatError(f"{what} cannot be {value!r}; expected something like {default!r}")


def _relocated(
    patterns: Mapping[str, Any], modules: Mapping[str, str], what: str
) -> dict[str, Any]:
    """Patterns that give the new names what they give the old ones."""
    wanted = {new: first_match(patterns, old, what) for old, new in modules.items()}
    for value in wanted.values():
        if value is not None and (type(value) not in (int, float) or not isfinite(value)):
            raise FormatError(f"{what} gives {value!r}, expected numbers")
    if all(first_match(patterns, new, what) == value for new, value in wanted.items()):
        return dict(patterns)
    return {re.escape(name): value for name, value in wanted.items() if value is not None}
