"""Folding adapters of the LoRA family into the weights that they stand at.

The formulae are those by which peft merges (`merge_and_unload`), in deltakit's arithmetic: float32,
products rank by rank (see `deltakit.adapters.fold_products`). What a change adds to is the base
alone, so that several adapters at one tensor add up in any order of folding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any

import numpy as np

from deltakit.adapters.fold_dora import Dora
from deltakit.adapters.fold_products import (
    Change,
    Difference,
    Hadamard,
    Kronecker,
    Product,
    Rescaled,
    Rows,
)
from deltakit.dtypes import Array
from deltakit.errors import CoordinateError, DeltaError

Read = Callable[[str, int, int], Array]
_MAGNITUDE = "lora_magnitude_vector.weight"


@dataclass(frozen=True, eq=False, kw_only=True)
class Site:
    """One module that an adapter stands at, with what folding needs to know.

    kind, config: of the adapter. module: its name, that of its weight without `.weight`. values:
    parameter -> trained values. subtracted: parameter -> initial values, where training began with
    a base from which they had been subtracted (LoftQ, PiSSA); empty otherwise. shapes: tensor of
    the base -> its shape. read: (tensor of the base, start, stop) -> flat elements in float32.
    """

    kind: str
    config: Mapping[str, Any]
    module: str
    values: Mapping[str, Array]
    shapes: Mapping[str, tuple[int, ...]]
    read: Read
    subtracted: Mapping[str, Array] = field(default_factory=dict)

    @property
    def weight(self) -> str:
        """The name of the weight."""
        return f"{self.module}.weight"

    @property
    def bias(self) -> str | None:
        """The name of the bias, where there is one."""
        name = f"{self.module}.bias"
        return name if name in self.shapes else None

    def shape(self, name: str) -> tuple[int, int]:
        """A tensor of the base as a matrix: its first dimension and all others; a bias is a column."""
        shape = self.shapes[name]
        return (shape[0], prod(shape[1:])) if shape else (1, 1)

    def rows(self, name: str) -> Rows:
        """What gives rows of a tensor of the base, float32 [stop - start, columns]."""
        count = self.shape(name)[1]

        def read(start: int, stop: int) -> Array:
            return self.read(name, start * count, stop * count).reshape(-1, count)

        return read


def changes(site: Site) -> dict[str, Change]:
    """What folding an adapter at one module changes: tensor of the base -> its change.

    Raises DeltaError for an adapter whose parameters are of no kind that folds, and CoordinateError
    for a base with another shape.
    """
    for parameters, folded in _FORMS:
        if parameters <= site.values.keys():
            return folded(site)
    listed = ", ".join(sorted(site.values))
    raise cannot(site.kind, f"its parameters at {site.module!r} are {listed}")


def cannot(kind: str, why: str) -> DeltaError:
    """The error for an adapter that does not fold."""
    return DeltaError(
        f"adapter {kind!r} cannot be folded into the base's weights: {why}; deltakit convert "
        "exports it as modules, dk.apply and deltakit evaluate use it as it is"
    )


def _lora(site: Site) -> dict[str, Change]:
    """scaling * B A for a linear, convolutional or embedding layer (Hu et al., "LoRA", 2021), with
    magnitudes where the adapter has them (DoRA)."""
    _refuse_others(site, {"lora_A.weight", "lora_B.weight", "lora_B.bias", _MAGNITUDE})
    scaling = _scaling(site, "lora_alpha", len(site.values["lora_A.weight"]))
    return _low_rank(site, "lora_A.weight", "lora_B.weight", scaling)


def _embedding(site: Site) -> dict[str, Change]:
    _refuse_others(site, {"lora_embedding_A", "lora_embedding_B", _MAGNITUDE})
    scaling = _scaling(site, "lora_alpha", len(site.values["lora_embedding_A"]))
    return _low_rank(site, "lora_embedding_A", "lora_embedding_B", scaling)


def _adalora(site: Site) -> dict[str, Change]:
    """scaling / rank * B (A * E) (Zhang et al., "AdaLoRA", 2023); rank + 1e-5 as in peft."""
    _refuse_others(site, {"lora_A", "lora_B", "lora_E"})
    rank = len(site.values["lora_A"])
    alpha = _configured(site, "lora_alpha", "alpha_pattern")
    return _low_rank(site, "lora_A", "lora_B", (alpha if alpha > 0 else rank) / (rank + 1e-5))


def _low_rank(site: Site, down: str, up: str, scaling: float) -> dict[str, Change]:
    values = site.values
    product, transposed = _product(site, site.values, down, up, scaling)
    inner: Change = product
    if site.subtracted:
        before, _ = _product(site, site.subtracted, down, up, scaling)
        inner = Difference(product, before)
    found: dict[str, Change] = {site.weight: inner}
    if _MAGNITUDE in values:
        magnitude = values[_MAGNITUDE].reshape(-1)
        outputs = inner.shape[1] if transposed else inner.shape[0]
        if len(magnitude) != outputs:
            raise _other_shape(site, site.weight, f"{len(magnitude)} magnitudes")
        found[site.weight] = Dora(inner, site.rows(site.weight), magnitude, transposed)
    if "lora_B.bias" in values:
        bias = values["lora_B.bias"].reshape(-1, 1)
        found[_bias(site, bias)] = Product(bias, np.ones((1, 1), np.float32), scaling)
    return found


def _product(
    site: Site, values: Mapping[str, Array], down: str, up: str, scaling: float
) -> tuple[Product, bool]:
    """The product in the base tensor's own orientation, and whether that is [inputs, outputs]."""
    a = values[down].reshape(len(values[down]), -1)
    if "lora_E" in values:
        a = a * values["lora_E"].reshape(-1, 1)
    b = values[up].reshape(len(values[up]), -1)
    if b.shape[1] != len(a):
        raise cannot(site.kind, f"{up} has rank {b.shape[1]} at {site.module!r}, {down} {len(a)}")
    straight, turned = (len(b), a.shape[1]), (a.shape[1], len(b))
    transposed = down == "lora_embedding_A" or bool(site.config.get("fan_in_fan_out"))
    shape = site.shape(site.weight)
    if shape not in (straight, turned):
        raise _other_shape(site, site.weight, f"{straight[0]} outputs of {straight[1]} inputs")
    if straight != turned:
        transposed = shape == turned
    if transposed:
        return Product(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), scaling), True
    return Product(b, a, scaling), False


def _ia3(site: Site) -> dict[str, Change]:
    """base * l by inputs (feed-forward layers) or by outputs, whose bias is multiplied as well."""
    _refuse_others(site, {"ia3_l"})
    gain, shape = site.values["ia3_l"], site.shape(site.weight)
    by_output = gain.shape[-1] == 1
    by_row = by_output != bool(site.config.get("fan_in_fan_out"))
    if gain.size != shape[0 if by_row else 1]:
        by_row = not by_row  # a layer of the other orientation
    if gain.ndim != 2 or 1 not in gain.shape or gain.size != shape[0 if by_row else 1]:
        raise _other_shape(site, site.weight, f"factors of shape {list(gain.shape)}")
    turned = gain.reshape((-1, 1) if by_row else (1, -1))
    found: dict[str, Change] = {site.weight: Rescaled(site.rows(site.weight), turned, shape)}
    if by_output and site.bias is not None:
        column = gain.reshape(-1, 1)
        found[site.bias] = Rescaled(site.rows(site.bias), column, (gain.size, 1))
    return found


def _loha(site: Site) -> dict[str, Change]:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    _refuse_others(site, set(names))
    one_a, one_b, other_a, other_b = (site.values[name] for name in names)
    scaling = _scaling(site, "alpha", len(one_b))
    return _whole(site, Hadamard(Product(one_a, one_b), Product(other_a, other_b), scaling))


def _lokr(site: Site) -> dict[str, Change]:
    _refuse_others(site, {f"lokr_w{n}{part}" for n in (1, 2) for part in ("", "_a", "_b")})
    ranks = [len(site.values[name]) for name in site.values if name.endswith("_b")]
    rank = ranks[0] if ranks else int(_configured(site, "r", "rank_pattern"))
    scaling = _scaling(site, "alpha", rank)
    return _whole(site, Kronecker(_kron(site, "lokr_w1"), _kron(site, "lokr_w2"), scaling))


def _kron(site: Site, name: str) -> Array:
    """A factor of LoKr as a matrix: it stands whole, or as a product itself."""
    if name in site.values:
        whole = site.values[name]
        if whole.ndim == 3:
            raise cannot(site.kind, f"{name} has 3 dimensions at {site.module!r}")
        return np.ascontiguousarray(whole.reshape(len(whole), -1))
    product = Product(site.values[f"{name}_a"], site.values[f"{name}_b"])
    return product.rows(0, product.shape[0])


def _whole(site: Site, change: Change) -> dict[str, Change]:
    if change.shape != site.shape(site.weight):
        raise _other_shape(site, site.weight, f"a change of shape {list(change.shape)}")
    return {site.weight: change}


_FORMS: list[tuple[set[str], Callable[[Site], dict[str, Change]]]] = [
    ({"lora_A.weight", "lora_B.weight"}, _lora),
    ({"lora_embedding_A", "lora_embedding_B"}, _embedding),
    ({"lora_A", "lora_B", "lora_E"}, _adalora),
    ({"ia3_l"}, _ia3),
    ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, _loha),
    ({"lokr_w1", "lokr_w2"}, _lokr),
    ({"lokr_w1", "lokr_w2_a", "lokr_w2_b"}, _lokr),
    ({"lokr_w1_a", "lokr_w1_b", "lokr_w2"}, _lokr),
    ({"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}, _lokr),
]


def _scaling(site: Site, key: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) (Kalajdzievski, "rsLoRA", 2023)."""
    alpha = _configured(site, key, "alpha_pattern")
    return alpha / sqrt(rank) if site.config.get("use_rslora") else alpha / rank


def _configured(site: Site, key: str, patterns: str) -> float:
    """A number of the configuration, which the first of its patterns to fit the end of the module's
    name replaces, as in peft."""
    for pattern, value in dict(site.config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", site.module):
            return float(value)
    if key not in site.config:
        raise cannot(site.kind, f"its configuration lacks {key!r}")
    return float(site.config[key])


def _bias(site: Site, values: Array) -> str:
    if site.bias is None or site.shape(site.bias) != values.shape:
        raise _other_shape(site, f"{site.module}.bias", f"{len(values)} biases")
    return site.bias


def _refuse_others(site: Site, known: set[str]) -> None:
    others = sorted(site.values.keys() - known)
    if others:
        raise cannot(
            site.kind, f"nothing is known of its parameter {others[0]!r} at {site.module!r}"
        )
    if site.config.get("alora_invocation_tokens") or site.config.get("use_qalora"):
        raise cannot(site.kind, "what it adds depends on the input")


def _other_shape(site: Site, name: str, what: str) -> CoordinateError:
    shape = site.shapes.get(name)
    found = "the base lacks it" if shape is None else f"in the base it has shape {list(shape)}"
    return CoordinateError(f"the adapter has {what} for tensor {name!r}; {found}")
