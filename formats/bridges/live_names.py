"""From names in a checkpoint to those of a live model, for adapters that are written for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from deltakit.delta import SparseDelta
from deltakit.errors import ConfigError
from deltakit.formats.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class LiveNames:
    """A rule: `off` is taken off the names of the checkpoint, `on` put before them."""

    off: str = ""
    on: str = ""

    def __call__(self, name: str) -> str:
        """The live name of what the checkpoint calls `name`."""
        return self.on + name.removeprefix(self.off)

    def as_dict(self) -> dict[str, str]:
        """The rule as plain JSON."""
        return {key: text for key, text in (("off", self.off), ("on", self.on)) if text}


def rule_between(live: Mapping[str, str]) -> LiveNames:
    """The rule that gave live names for names in the checkpoint: live name -> that name."""
    for name, stored in live.items():
        if name != stored and name.endswith(stored):
            return LiveNames(on=name[: -len(stored)])
        if name != stored:
            return LiveNames(off=stored[: -len(name)])
    return LiveNames()


def live_names(
    delta: SparseDelta, modules: Iterable[str], base: Checkpoint | None, prefix: str
) -> LiveNames:
    """The rule for the model that a delta was made for.

    modules: names in the checkpoint. prefix: what the user says that the live names begin with, or
    "". Otherwise it is what was found when the delta was read from an adapter, or follows from the
    model's class, which the delta or its base records (BertForSequenceClassification calls what a
    checkpoint of BertModel calls `encoder`, `bert.encoder`); without any of it names are equal.
    """
    if prefix:
        return LiveNames(on=prefix)
    told = delta.provenance.get("peft")
    if isinstance(told, Mapping) and isinstance(told.get("names"), Mapping):
        found = {key: told["names"].get(key, "") for key in ("off", "on")}
        return LiveNames(**{key: text for key, text in found.items() if isinstance(text, str)})
    named = delta.config.get("architectures") or _config(base).get("architectures")
    known = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    return _of_class(known[0], modules if base is None else base.names) if known else LiveNames()


def _config(base: Checkpoint | None) -> Mapping[str, Any]:
    return {} if base is None else base.config() or {}


def _of_class(architecture: str, stored: Iterable[str]) -> LiveNames:
    """The rule of a class of transformers, with or without a head, for a checkpoint's names."""
    try:
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
    except ImportError:
        raise ConfigError(
            f"what {architecture} calls the base's modules is known to transformers, which is not "
            "installed; install it, or say what it has before their names (--prefix)"
        ) from None
    inner = getattr(getattr(transformers, architecture, None), "base_model_prefix", "")
    if not inner:
        return LiveNames()
    begins = any(name.startswith(f"{inner}.") for name in stored)
    bare = {
        n
        for names in MODEL_MAPPING_NAMES.values()
        for n in ([names] if isinstance(names, str) else names)
    }
    if architecture in bare:
        return LiveNames(off=f"{inner}." if begins else "")
    return LiveNames(on="" if begins else f"{inner}.")


def renamed_extras(
    names: Iterable[str], rule: LiveNames, base: Checkpoint | None
) -> dict[str, str]:
    """Name of an extra -> its live name: a new head stands outside the model that the rule is about.

    Raises ConfigError where the base is needed to tell them apart.
    """
    extras = list(names)
    if extras and rule != LiveNames() and base is None:
        raise ConfigError(
            f"extra {extras[0]!r} may be a new head or a part of the base, which the adapted model "
            "has under other names; give the base (--base)"
        )
    inside = set() if base is None else set(base.tensors)
    return {name: rule(name) if name in inside else name for name in extras}
