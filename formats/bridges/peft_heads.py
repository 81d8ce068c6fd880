"""Heads and other tensors that PEFT's adapters save whole: extras, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from deltakit.dtypes import Array
from deltakit.errors import ConfigError
from deltakit.formats.checkpoint import Checkpoint

_CLASSIFIES = ("SEQ_CLS", "TOKEN_CLS")
_HEADS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")


def label_changes(
    task: Any, extras: Mapping[str, Array], base: Checkpoint | None
) -> dict[str, Any]:
    """The changes to config.json that a head of another size than the base's config says needs.

    task: PEFT's task_type. Labels get the names that transformers gives them.
    """
    heads = [extras[name] for name in _HEADS if name in extras and extras[name].ndim == 2]
    config = {} if base is None else base.config() or {}
    known = config.get("id2label")
    count = len(known) if isinstance(known, dict) else 2  # as transformers takes it to be
    if task not in _CLASSIFIES or not heads or len(heads[0]) == count:
        return {}
    names = [f"LABEL_{number}" for number in range(len(heads[0]))]
    return {
        "num_labels": len(names),
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def saved_keys(
    extras: Mapping[str, str], adapted: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """Extra -> the key that PEFT saves it under, and the modules that are saved (`modules_to_save`).

    extras: name -> live name. adapted: live names of the modules that the adapter stands at, whose
    own tensors PEFT keeps in a `base_layer`. A bias alone is saved without its module. Raises
    ConfigError for an extra that PEFT cannot save.
    """
    owners = {live.rpartition(".")[0] for live in extras.values() if not live.endswith(".bias")}
    keys, modules = {}, set()
    for name, live in extras.items():
        module, _, last = live.rpartition(".")
        if not module or name.endswith(":]"):
            what = "outside of any module" if not module else "of rows that a tensor grows by"
            raise ConfigError(f"the delta has an extra {name!r} {what}, which PEFT cannot save")
        if module in adapted:
            keys[name] = f"{module}.base_layer.{last}"
            continue
        keys[name] = live
        if module in owners:
            modules.add(module)
    return keys, sorted(modules)
