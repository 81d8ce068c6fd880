"""Dense, naive forms of the stacking methods: whole arrays, loops, no supports, no unions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from fractions import Fraction
from itertools import product
from math import floor
from typing import Any

import numpy as np

from deltakit.combine import METHODS
from deltakit.combine.method import Method
from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import Array
from deltakit.formats.seeded import philox_words

Dense = dict[str, Array]  # tensor name -> whole array
F32 = np.float32


def dense(delta: SparseDelta, shapes: dict[str, tuple[int, ...]]) -> Dense:
    """The changes of a delta as whole arrays, zero where it has no entry."""
    made = {}
    for name, shape in shapes.items():
        flat = np.zeros(int(np.prod(shape)), F32)
        if name in delta.tensors:
            flat[delta.tensors[name].indices] = delta.tensors[name].values
        made[name] = flat.reshape(shape)
    return made


def sparse(arrays: dict[str, Any], **more: Any) -> SparseDelta:
    """The `add` delta of whole float32 arrays, an entry for each element that is not NaN."""
    tensors = {}
    for name, array in arrays.items():
        flat = np.asarray(array, F32).reshape(-1)
        held = np.flatnonzero(~np.isnan(flat))
        if held.size:
            tensors[name] = TensorDelta(
                name=name,
                shape=np.shape(array),
                dtype="float32",
                mode="add",
                indices=held,
                values=flat[held],
            )
    return SparseDelta(tensors=tensors, **more)


def reference(name: str, method: Method, deltas: Sequence[Dense], weights: list[float]) -> Dense:
    """What the method called `name` makes of dense task vectors."""
    options = {field.name: getattr(method, field.name) for field in fields(method)}
    exact = name in ("linear", "disjoint")  # these scale their weights, in double precision
    made = DENSE[name](deltas, weights if exact else [F32(w) for w in weights], options)
    scale = F32(1) if exact else F32(options["scale"])
    return {n: array * scale for n, array in made.items()}


def count(density: float, whole: int, rounding: str = "exact") -> int:
    return int(density * whole) if rounding == "float" else floor(Fraction(str(density)) * whole)


def largest(scores: Array, k: int) -> Array:
    """Mask of the k largest of flat scores, the lower position first."""
    mask = np.zeros(scores.shape, bool)
    mask[np.argsort(-scores, kind="stable")[: max(k, 0)]] = True
    return mask


def trim(tau: Dense, o: dict[str, Any]) -> Dense:
    flat = np.concatenate([array.reshape(-1) for array in tau.values()])
    if o["trim_scope"] == "global":
        whole = len(flat) if o["density_of"] == "numel" else np.count_nonzero(flat)
        k = max(o["least"], count(o["density"], int(whole), o["rounding"]))
        kept = flat * largest(np.abs(flat), k)
        ends = np.cumsum([array.size for array in tau.values()])[:-1]
        pieces = np.split(kept, ends)
        return {n: p.reshape(tau[n].shape) for n, p in zip(tau, pieces, strict=True)}
    made = {}
    for name, array in tau.items():
        whole = array.size if o["density_of"] == "numel" else np.count_nonzero(array)
        k = max(o["least"], count(o["density"], int(whole), o["rounding"]))
        made[name] = array * largest(np.abs(array).reshape(-1), k).reshape(array.shape)
    return made


def uniform(tau: Array, o: dict[str, Any], name: str, number: int) -> Array:
    """The draws of the changes other than zero, at their places; 0 elsewhere."""
    held = np.flatnonzero(tau)
    words = philox_words(o["seed"], name, len(held), f"stack {number}")
    drawn = np.zeros(tau.size)
    drawn[held] = [int(word) // 2**11 / 2**53 for word in words]
    return drawn.reshape(tau.shape)


def thin(tau: Array, chance: Any, o: dict[str, Any], name: str, number: int) -> Array:
    chance = np.broadcast_to(chance, tau.shape)
    kept = np.where(uniform(tau, o, name, number) < chance, tau, F32(0))
    if o["rescale"] == "inverse":
        return np.asarray(np.divide(kept, chance.astype(F32), where=kept != 0, out=kept.copy()))
    if o["rescale"] == "l1":
        before, after = (float(np.abs(a).sum(dtype=np.float64)) for a in (tau, kept))
        return np.asarray(kept * F32(before / after if min(before, after) >= 1e-7 else 1))
    return np.asarray(kept)


def magprune_chance(tau: Array, o: dict[str, Any]) -> Array:
    """Row by row and element by element."""
    rows = tau.reshape(-1, tau.shape[-1]) if tau.ndim else tau.reshape(1, 1)
    chance = np.zeros(rows.shape)
    for row, at in product(range(rows.shape[0]), range(rows.shape[1])):
        if rows[row, at] == 0:
            continue
        below = [
            j
            for j, other in enumerate(rows[row])
            if (abs(other), -j) < (abs(rows[row, at]), -at)
            and (other != 0 or o["density_of"] == "numel")
        ]
        held = np.count_nonzero(rows[row])
        of = rows.shape[1] if o["density_of"] == "numel" else held
        relative = len(below) / (of - 1) if of > 1 else 0.5
        chance[row, at] = o["density"] - o["epsilon"] + relative * (2 * o["epsilon"])
    return chance.reshape(tau.shape)


def middle(tau: Array, o: dict[str, Any]) -> Array:
    """All elements sorted by magnitude; both ends go."""
    flat = tau.reshape(-1)
    n = flat.size if o["density_of"] == "numel" else int(np.count_nonzero(flat))
    inner = count(o["density"], n, o["rounding"])
    outer = min(count(o["gamma"], n, o["rounding"]), n - inner)
    order = np.argsort(-np.abs(flat), kind="stable")[outer : outer + inner]
    kept = np.zeros_like(flat)
    kept[order] = flat[order]
    return kept.reshape(tau.shape)


def total(terms: list[Array]) -> Array:
    made = np.zeros_like(terms[0])
    for term in terms:
        made = made + term
    return made


def add_up(deltas: Sequence[Dense], weights: list[Any], o: dict[str, Any]) -> Dense:
    made = {n: total([w * d[n] for w, d in zip(weights, deltas, strict=True)]) for n in deltas[0]}
    if o.get("normalize"):
        divisor = np.sum(weights, dtype=F32) or F32(1)
        made = {name: array / divisor for name, array in made.items()}
    return made


def agree(deltas: Sequence[Dense], weights: list[Any], o: dict[str, Any]) -> Dense:
    weighted = [{n: w * a for n, a in d.items()} for w, d in zip(weights, deltas, strict=True)]
    voters = weighted if o["elect"] == "weighted" else deltas
    signs = {}
    for name in deltas[0]:
        votes = [v[name] for v in voters]
        if o["sign_by"] == "frequency":
            votes = [np.sign(vote) for vote in votes]
        signs[name] = np.sign(total(votes))
    rest = np.sign(sum(float(array.sum()) for array in signs.values()))
    made = {}
    for name, sign in signs.items():
        sign = np.where(sign == 0, 1 if o["tie"] == "positive" else rest, sign)
        masks = [(np.sign(v[name]) == sign) & (sign != 0) & (v[name] != 0) for v in voters]
        upper = total([w[name] * mask for w, mask in zip(weighted, masks, strict=True)])
        by = {"mean": weights, "count": [F32(1)] * len(weights), "sum": [F32(0)] * len(weights)}
        lower = total(
            [w * mask.astype(F32) for w, mask in zip(by[o["combine"]], masks, strict=True)]
        )
        made[name] = upper / np.where(lower == 0, F32(1), lower)
        if "votes" in o:
            made[name] = np.where(np.sum(masks, axis=0) >= o["votes"], made[name], F32(0))
    return made


def variance(terms: list[Array]) -> Array:
    """n^2 times the variance of each element, in exact arithmetic."""
    exact = [[Fraction(float(x)) for x in term.reshape(-1)] for term in terms]
    n = len(terms)
    spread = [n * sum(x * x for x in at) - sum(at) ** 2 for at in zip(*exact, strict=True)]
    return np.array([float(v) for v in spread]).reshape(terms[0].shape)


def sce(deltas: Sequence[Dense], weights: list[Any], o: dict[str, Any]) -> Dense:
    made = {}
    for name in deltas[0]:
        terms = [w * d[name] for w, d in zip(weights, deltas, strict=True)]
        if o["density"] < 1:
            spread = variance(terms).reshape(-1)
            chosen = largest(spread, count(o["density"], int(np.count_nonzero(spread))))
            terms = [term * chosen.reshape(term.shape) for term in terms]
        means = [float((term.astype(np.float64) ** 2).sum()) / term.size for term in terms]
        if sum(means) <= o["guard"]:
            energies = [F32(1 / len(terms))] * len(terms)
        else:
            sums = np.array([(term.astype(np.float64) ** 2).sum() for term in terms])
            energies = [F32(e) for e in sums / sums.sum()]
        sign = np.where(total(terms) >= 0, 1, -1)
        masks = [(np.sign(term) == sign).astype(F32) for term in terms]
        upper = total([e * t * m for e, t, m in zip(energies, terms, masks, strict=True)])
        lower = total([e * m for e, m in zip(energies, masks, strict=True)])
        lower = np.maximum(lower, F32(o["guard"]))
        made[name] = upper / np.where(lower > 0, lower, F32(1))
    return made


def ram(deltas: Sequence[Dense], weights: list[Any], o: dict[str, Any]) -> Dense:
    terms = [{n: w * a for n, a in d.items()} for w, d in zip(weights, deltas, strict=True)]
    held = [{n: np.abs(a) > F32(o["threshold"]) for n, a in t.items()} for t in terms]
    counts = {n: np.sum([h[n] for h in held], axis=0) for n in deltas[0]}
    made = {}
    for name, by in counts.items():
        mean = total([np.where(h[name], t[name], F32(0)) for h, t in zip(held, terms, strict=True)])
        made[name] = mean / np.maximum(by, 1).astype(F32)
        if "strength" not in o:
            continue
        for h in held:
            names = [name] if o["count_scope"] == "tensor" else list(counts)
            unique = sum(int((h[n] & (counts[n] == 1)).sum()) for n in names)
            shared = sum(int((h[n] & (counts[n] > 1)).sum()) for n in names)
            ratio = shared / unique if unique else 0.0
            factor = F32(1 + o["strength"] * min(ratio, o["bound"]))
            made[name] = np.where(h[name] & (by == 1), made[name] * factor, made[name])
    return made


def tall_masks(deltas: Sequence[Dense], weights: list[Any], o: dict[str, Any]) -> Dense:
    made = {}
    for name in deltas[0]:
        terms = [w * d[name] for w, d in zip(weights, deltas, strict=True)]
        whole = total(terms)
        uses = [np.abs(t) >= F32(o["threshold"]) * np.abs(whole - t) for t in terms]
        made[name] = np.where(np.sum(uses, axis=0) >= o["votes"], whole, F32(0))
    return made


def max_magnitude(deltas: Sequence[Dense], weights: list[Any], o: dict[str, Any]) -> Dense:
    made = {}
    for name in deltas[0]:
        terms = np.stack([w * d[name] for w, d in zip(weights, deltas, strict=True)])
        best = np.abs(terms).argmax(axis=0)  # the first of equals
        made[name] = np.take_along_axis(terms, best[None], axis=0)[0]
    return made


def _trimmed(then: Any) -> Any:
    return lambda deltas, weights, o: then([trim(d, o) for d in deltas], weights, o)


def _thinned(chance: Any, then: Any) -> Any:
    def run(deltas: Sequence[Dense], weights: list[Any], o: dict[str, Any]) -> Dense:
        thinned = [
            {n: thin(a, chance(a, o), o, n, number) for n, a in d.items()}
            for number, d in enumerate(deltas)
        ]
        return then(thinned, weights, o)  # type: ignore[no-any-return]

    return run


def _cut(then: Any) -> Any:
    return lambda deltas, weights, o: then(
        [{n: middle(a, o) for n, a in d.items()} for d in deltas], weights, o
    )


def _density(tau: Array, o: dict[str, Any]) -> float:
    return float(o["density"])


def _linear(deltas: Sequence[Dense], weights: list[Any], o: dict[str, Any]) -> Dense:
    """Scale and normalize belong to the weights, in double precision."""
    factor = o["scale"]
    if o["normalize"]:
        factor /= sum(weights) or 1.0
    return add_up(deltas, [F32(w * factor) for w in weights], {})


DENSE: dict[str, Callable[[Sequence[Dense], list[Any], dict[str, Any]], Dense]] = {
    "breadcrumbs": _cut(add_up),
    "breadcrumbs-ties": _cut(agree),
    "consensus": agree,
    "dare": _thinned(_density, add_up),
    "dare-ties": _thinned(_density, agree),
    "della": _thinned(magprune_chance, agree),
    "della-linear": _thinned(magprune_chance, add_up),
    "disjoint": _linear,
    "linear": _linear,
    "magnitude": _trimmed(add_up),
    "max-magnitude": max_magnitude,
    "ram": ram,
    "ram-plus": ram,
    "sce": sce,
    "tall-masks": tall_masks,
    "task-arithmetic": add_up,
    "ties": _trimmed(agree),
}
CASES = [
    (record.name, flavour) for record in METHODS for flavour in ("paper", *record.target.flavours)
]
