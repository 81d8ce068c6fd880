"""The text of `deltakit inspect`: sections of aligned columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from deltakit.adapters.summary import adapter_summary
from deltakit.budget import format_bytes, format_count
from deltakit.changes import Changes
from deltakit.cli.options import count, table
from deltakit.delta import BaseIdentity
from deltakit.formats.header import TensorRecord
from deltakit.groups import Group
from deltakit.inspection import Inspection, ratio

_CHANGE_HEADS = ["min |change|", "mean", "max"]


def report(found: Inspection, tensors: bool) -> list[str]:
    """The sections, each a block of lines."""
    sections = [_summary(found), _sizes(found)]
    if (adapter := adapter_summary(found.header)) is not None:
        sections.insert(1, _adapter(adapter))
    if found.tensors and tensors:
        sections.append(_tensors(found))
    elif found.tensors:
        sections.append(_groups(found, "block", found.blocks))
        sections.append(_groups(found, "kind", found.kinds))
    if found.header.extras:
        sections.append(_extras(found))
    if found.header.config:
        sections.append(_facts("config changes", found.header.config))
    if found.header.provenance:
        sections.append(_facts("provenance", found.header.provenance))
    return sections


def _summary(found: Inspection) -> str:
    tensors, extras = found.tensors, found.header.extras
    modes = ", ".join(sorted({t.mode for t in tensors})) or "none"
    dtypes = ", ".join(sorted({_dtypes(t) for t in tensors})) or "none"
    whole = "touched tensors" if found.header.adapter is None else "adapter"
    density = f"{percent(found.density_of_touched)} of the {whole}"
    if found.density_of_base is not None:
        density = f"{percent(found.density_of_base)} of the base, {density}"
    rows = [
        [
            "file",
            f"{found.path} ({format_bytes(found.file_bytes)}, .sdelta version {found.header.version})",
        ],
        ["base", _base(found.header.base)],
        ["entries", f"{found.entries:,} in {count('tensor', tensors)}"],
        ["density", density],
        ["mode", f"{modes}; {dtypes}"],
        ["changes", _changes_line(found.changes_in(tensors))],
    ]
    if extras:
        rows.append(["extras", f"{found.extra_weights:,} weights in {count('tensor', extras)}"])
    return table(rows)


def _adapter(adapter: Mapping[str, Any]) -> str:
    """What rebuilds the adapter, and what of it is kept."""
    modules = adapter["modules"]
    config = [
        f"{key} {_fact(v)}" for key, v in adapter["config"].items() if v not in (None, {}, [])
    ]
    rules = [f"{name} {_rule(rule)}" for name, rule in adapter["initial"].items()]
    kept = f"{percent(adapter['kept'])} of its {format_count(adapter['weights'])} weights"
    such = f" (such as {modules[0]})" if modules else ""
    rows = [
        ["adapter", f"{adapter['kind']} at {count('module', modules)}{such}"],
        ["  configuration", ", ".join(config)],
        ["  kept", kept],
        ["  initial values", f"seed {adapter['seed']}: {', '.join(rules)}"],
        ["  check value", adapter["check"]],
        ["  stands at", f"{count('tensor', adapter['stands_at'])} of the base fingerprinted"],
    ]
    return table(rows)


def _rule(rule: Mapping[str, Any]) -> str:
    ((how, value),) = rule.items()
    return "stored" if how == "stored" else f"{how} {value}"


def _base(base: BaseIdentity | None) -> str:
    if base is None:
        return "not recorded"
    parts = [base.model_id or "no id recorded"]
    if base.revision:
        parts[0] += f" @ {base.revision}"
    if base.total_weights is not None:
        parts.append(f"{format_count(base.total_weights)} weights")
    parts.append(f"{count('tensor', base.tensors)} fingerprinted")
    return ", ".join(parts)


def _changes_line(changes: Changes | None) -> str:
    if changes is None:
        return "not read, as the values are on the Hub"
    parts = []
    if changes.known:
        parts.append(
            f"|change| min {changes.least:.3g}, mean {changes.mean:.3g}, max {changes.most:.3g}"
        )
    if changes.zeros:
        parts.append(f"{changes.zeros:,} zero")
    if changes.non_finite:
        parts.append(f"{changes.non_finite:,} to or from non-finite values")
    if changes.unknown:
        parts.append(f"{changes.unknown:,} unknown (set mode without base values)")
    if changes.first_step is not None:
        parts.append(f"unmasked at steps {changes.first_step} to {changes.last_step}")
    return "; ".join(parts) or "none"


def _sizes(found: Inspection) -> str:
    entries, parts, entropy = found.entries, found.parts, found.entropy_bytes

    def row(what: str, size: float, remark: str = "") -> list[str]:
        return [what, format_bytes(size), f"{ratio(8 * size, entries):.2f}", remark]

    rows = [["size", "bytes", "bits/entry", ""], row("file", found.file_bytes)]
    rows += [row(f"  {part.replace('_', ' ')}", size) for part, size in parts.items() if size]
    if entries:
        over = f"indices take {parts['indices'] / entropy:.3f}x this" if entropy >= 1 else ""
        rows.append(row("entropy of support", entropy, over))
        saved = f"{found.raw_coo_bytes / (found.file_bytes - parts['extras']):.2f}x the file"
        saved += " without extras" if parts["extras"] else ""
        rows.append(row("raw COO, int64 + float32", found.raw_coo_bytes, saved))
    return table(rows, right=(1, 2))


def _groups(found: Inspection, what: str, groups: Sequence[Group]) -> str:
    rows = [[what, "tensors", "entries", "share", "density", *_CHANGE_HEADS]]
    for group in groups:
        rows.append(
            [
                group.name,
                str(len(group.tensors)),
                f"{group.entries:,}",
                percent(ratio(group.entries, found.entries)),
                percent(group.density),
                *_change_cells(found.changes_in(group.tensors)),
            ]
        )
    return table(rows, right=range(1, 8))


def _tensors(found: Inspection) -> str:
    heads = ["tensor", "shape", "dtype", "mode", "entries", "density", "coding", "bits/index"]
    rows = [[*heads, *_CHANGE_HEADS, "steps"]]
    for tensor in found.tensors:
        changes = found.changes_in([tensor])
        steps = ""
        if changes is not None and changes.first_step is not None:
            steps = f"{changes.first_step}-{changes.last_step}"
        rows.append(
            [
                tensor.name,
                _shape(tensor.shape),
                _dtypes(tensor),
                tensor.mode,
                f"{tensor.nnz:,}",
                percent(ratio(tensor.nnz, tensor.numel)),
                tensor.coding,
                f"{ratio(8 * tensor.index_bytes, tensor.nnz):.2f}",
                *_change_cells(changes),
                steps,
            ]
        )
    return table(rows, right=(4, 5, 7, 8, 9, 10))


def _extras(found: Inspection) -> str:
    rows = [["extra", "shape", "dtype", "bytes"]]
    rows += [
        [e.name, _shape(e.shape), e.dtype, format_bytes(e.nbytes)]
        for e in found.header.extras.values()
    ]
    return table(rows, right=(3,))


def _facts(title: str, facts: Mapping[str, Any]) -> str:
    rows = [[f"  {key}", _fact(value)] for key, value in facts.items()]
    return f"{title}\n{table(rows)}"


def _fact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _change_cells(changes: Changes | None) -> list[str]:
    if changes is None or not changes.known:
        return ["-", "-", "-"]
    return [f"{size:.3g}" for size in (changes.least, changes.mean, changes.most)]


def _dtypes(tensor: TensorRecord) -> str:
    if tensor.dtype == tensor.trained_dtype:
        return tensor.dtype
    return f"{tensor.dtype} trained as {tensor.trained_dtype}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape) or "scalar"


def percent(share: float) -> str:
    """A share in per cent with three significant digits: 0.00441 -> '0.441 %'."""
    return f"{100 * share:.3g} %"
