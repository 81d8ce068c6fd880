"""From names in a checkpoint to those of a live model, for adapters that are written for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    delta: SparseDelta, names: Sequence[str], base: Checkpoint | None, prefix: str
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Name in the checkpoint -> live name, for the model that a delta was made for; and a note
    where nothing tells that model.

    names: of modules and of extras; a new head, which the base lacks, stands outside the model that
    a prefix is about. prefix: what the user says that the live names begin with, or "". Otherwise
    it is what was found when the delta was read from an adapter, or follows from the model's class,
    which the delta or its base records (BertForSequenceClassification calls `bert.encoder` what
    a checkpoint of BertModel calls `encoder`); without any of it names are equal. Raises ConfigError
    where the base is needed to tell heads from other extras.
    """
    rule = LiveNames(on=prefix) if prefix else _recorded(delta)
    if rule is not None:
        return _by_rule(rule, delta, names, base), ()
    own = _architecture(delta.config)
    known = own or _architecture((base.config() if base is not None else None) or {})
    found = None if known is None or base is None else _of_class(known, base)
    if own is not None and found is not None:
        return {name: found.get(name, name) for name in names}, ()
    called = "the base" if found is None else known
    note = f"keys have the names of {called}; --prefix says what another model has before them"
    return {name: (found or {}).get(name, name) for name in names}, (note,)


def _recorded(delta: SparseDelta) -> LiveNames | None:
    told = delta.provenance.get("peft")
    if not isinstance(told, Mapping) or not isinstance(told.get("names"), Mapping):
        return None
    found = {key: told["names"].get(key, "") for key in ("off", "on")}
    return LiveNames(**{key: text for key, text in found.items() if isinstance(text, str)})


def _by_rule(
    rule: LiveNames, delta: SparseDelta, names: Sequence[str], base: Checkpoint | None
) -> dict[str, str]:
    extras = [name for name in names if name in delta.extras]
    if extras and rule != LiveNames() and base is None:
        raise ConfigError(
            f"extra {extras[0]!r} may be a new head or a part of the base, which the adapted model "
            "has under other names; give the base (--base)"
        )
    heads = {name for name in extras if base is not None and name not in base.tensors}
    return {name: name if name in heads else rule(name) for name in names}


def _architecture(config: Mapping[str, Any]) -> str | None:
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None


def _of_class(architecture: str, base: Checkpoint) -> dict[str, str] | None:
    """Tensors and modules of a checkpoint -> what a class of transformers calls them, by such a
    model without data; None for what is no such class or no checkpoint of it."""
    if base.directory is None:
        return None
    try:
        import torch
        import transformers
    except ImportError:
        return None
    from deltakit.live.coordinates import coordinates

    made = getattr(transformers, architecture, None)
    if not isinstance(made, type) or not issubclass(made, transformers.PreTrainedModel):
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(
            base.directory, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            where = coordinates(made(config), base, buffers=True)
    except (OSError, ValueError):
        return None
    tensors = {stored: live for live, stored in where.names.items() if stored is not None}
    modules = {s.rpartition(".")[0]: live.rpartition(".")[0] for s, live in tensors.items()}
    return {**modules, **tensors}
