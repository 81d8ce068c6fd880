"""Patterns that name tensors: target presets, shell patterns and parts of dotted names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from deltakit.dtypes import Array
from deltakit.errors import ConfigError, nearest
from deltakit.targets.preset_names import TARGET_PRESETS
from deltakit.targets.presets import preset_tensors

if TYPE_CHECKING:
    import torch


def matching(
    patterns: str | Iterable[str] | None,
    names: Mapping[str, str | None],
    what: str,
    model: torch.nn.Module | None = None,
) -> dict[str, Array | None]:
    """Live name -> what the patterns take of that tensor: None for all of it.

    names: live name -> name in the checkpoint; a pattern may match either. It is a target preset
    of `model` ("attention-qv", see `targets.presets`), a shell pattern ("*.query.weight")
    or a whole part of a dotted name ("encoder", "attention.self"); no patterns at all (None) take
    everything. A preset may take some features of a fused tensor alone: a boolean array that
    broadcasts to its shape. Raises ConfigError for a pattern that matches nothing.
    """
    if patterns is None:
        return dict.fromkeys(names)
    found: dict[str, Array | None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits: dict[str, Array | None]
        if model is not None and pattern in TARGET_PRESETS:
            hits = {n: part for n, part in preset_tensors(pattern, model).items() if n in names}
        else:
            hits = {n: None for n, stored in names.items() if _matches(pattern, n, stored or n)}
        if not hits:
            presets = [] if model is None else list(TARGET_PRESETS)
            listed = f"; presets: {', '.join(presets)}" if presets else ""
            raise ConfigError(
                f"{what} {pattern!r} matches no tensor{nearest(pattern, [*presets, *names])}{listed}"
            )
        for name, part in hits.items():
            before = found.get(name, part)
            found[name] = None if part is None or before is None else before | part
    return found


def _matches(pattern: str, *names: str) -> bool:
    if any(c in pattern for c in "*?["):
        return any(fnmatchcase(name, pattern) for name in names)
    return any(f".{pattern}." in f".{name}." for name in names)
