"""Structured masking by attention heads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import ConfigError
from deltakit.selection.methods import METHODS, Candidate, Scene, Start, check_budget
from deltakit.selection.units import NONE, Units, check_order, ordered, take_units
from deltakit.targets.roles import ATTENTION, Role, Spans, roles


@METHODS.register("heads", "whole attention heads", "structured masking, Xu and Zhang 2024")
@dataclass(frozen=True, kw_only=True)
class HeadMask:
    """The weights of some attention heads, exactly `budget` entries: the last head is cut.

    A head is its output features in the query, key and value weights and its input features in
    the output projection. The tensors of a layer take their heads in the same order; where queries
    share keys and values, those of one group stand together. Targets that are no attention weight
    get nothing. order: "random" (drawn from `seed` for every layer), "first" or "last".
    """

    budget: int
    order: str = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_order(self.order)

    def start(self, scene: Scene) -> Start:
        """The whole support; ConfigError where the model does not tell the size of its heads."""
        found = roles(scene.model) if scene.model is not None else {}
        spans = [_spans(target, found.get(target.live_name)) for target in scene.targets]
        groups: dict[str, int] = {}  # heads of keys and values per layer: the fewest of its tensors
        for target, heads in zip(scene.targets, spans, strict=True):
            if heads:
                layer, fewest = found[target.live_name].layer, min(map(len, heads.values()))
                groups[layer] = min(fewest, groups.get(layer, fewest))
        units = [
            self._units(target, found[target.live_name], heads, groups) if heads else NONE
            for target, heads in zip(scene.targets, spans, strict=True)
        ]
        return take_units(scene, self.budget, units, "attention heads")

    def _units(
        self, target: Candidate, role: Role, heads: dict[str, Spans], groups: dict[str, int]
    ) -> Units:
        """The heads of a tensor, group by group; a fused tensor's units are its groups' parts."""
        count = groups[role.layer]
        order = ordered(count, self.order, self.seed, role.layer, "heads")
        parts = [
            span
            for group in order.tolist()
            for spans in heads.values()
            for span in spans[group * len(spans) // count : (group + 1) * len(spans) // count]
        ]
        axis = role.output_axis if role.kind != "o" else 1 - role.output_axis
        return Units(np.arange(len(parts)), lambda unit: _band(target.shape, axis, *parts[unit]))


def _spans(target: Candidate, role: Role | None) -> dict[str, Spans] | None:
    """Role -> spans of its heads along the features of a target; None if it has no heads."""
    if role is None or role.kind not in (*ATTENTION, "qkv"):
        return None
    if role.head_dim is None or (role.kind == "qkv" and not role.spans):
        raise ConfigError(
            f"{target.live_name!r}: the model does not say how its features form attention heads; "
            "choose other targets or another mask"
        )
    if role.kind == "qkv":
        return dict(role.spans)
    features = target.shape[role.output_axis if role.kind != "o" else 1 - role.output_axis]
    width = role.head_dim
    return {role.kind: [(at, min(at + width, features)) for at in range(0, features, width)]}


def _band(shape: tuple[int, ...], axis: int, start: int, stop: int) -> Array:
    """Flat indices of the rows or columns start..stop of a matrix, sorted."""
    rows, columns = shape
    if axis == 0:
        return np.arange(start * columns, stop * columns)
    return np.asarray(np.arange(rows)[:, None] * columns + np.arange(start, stop)).reshape(-1)
