"""The section of a card that deltakit writes: what the delta changes, how to use it, its origin."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from deltakit.adapter import Adapter
from deltakit.budget import format_bytes
from deltakit.changes import Changes
from deltakit.delta import BaseIdentity
from deltakit.formats.header import TensorRecord
from deltakit.inspection import Inspection, ratio
from deltakit.lineage import brief
from deltakit.publishing.card_facts import Facts, mapping
from deltakit.publishing.card_usage import usage
from deltakit.publishing.markdown import code, table
from deltakit.publishing.travelling import fit_to_travel
from deltakit.targets.parts import PARTS, part_of

_FOLDERS = re.compile(r"(?<![\w:/.-])(?:file://|~|[A-Za-z]:)?[/\\](?:[^\s'\",;|\\/]+[/\\])+")
_MOST = 100  # rows of settings shown
_OF_NO_USE = ("output_dir", "threads", "logging_steps", "save_steps")  # to others


def sections(facts: Facts, kept: str) -> str:
    """The Markdown between the marks of begin and end. kept: what people wrote inside of it."""
    return "\n\n".join(
        [
            f"# {facts.repo_id.rpartition('/')[2]}",
            _summary(facts),
            kept,
            "## What it changes",
            _changes(facts.main.found),
            "## Files",
            _files(facts),
            "## How to use it",
            usage(facts),
            "## How it was made",
            _origin(facts),
        ]
    )


def _summary(facts: Facts) -> str:
    header = facts.main.found.header
    base, adapter = header.base, header.adapter
    to = "a base that is not named" if base is None else _named(base)
    total = None if base is None else base.total_weights
    of = "weights" if total is None else f"of {total:,} weights"
    kind = "A sparse delta"
    if adapter is not None:
        kind, of = f"A sparse delta of {code(adapter.kind)} adapters", "weights of the adapters"
    task = "" if facts.task is None else f" for {code(facts.task)}"
    return (
        f"{kind} to {to}{task}, made with deltakit: {facts.main.found.entries:,} {of} change; "
        "all others keep their bits."
    )


def _named(base: BaseIdentity) -> str:
    if base.model_id is None:
        return "a base that is not named"
    return _value(fit_to_travel(base.model_id, "model"))


def _changes(found: Inspection) -> str:
    header = found.header
    modes = ", ".join(sorted({t.mode for t in found.tensors})) or "none"
    dtypes = ", ".join(sorted({t.trained_dtype for t in found.tensors})) or "none"
    rows = [["", ""], ["entries", f"{found.entries:,} in {len(found.tensors)} tensors"]]
    if found.density_of_base is not None:
        rows.append(["density in the base", _percent(found.density_of_base)])
    whole = "touched tensors" if header.adapter is None else "adapters"
    rows += [
        [f"density in the {whole}", _percent(found.density_of_touched)],
        ["mode and dtype", f"{modes}; {dtypes}"],
    ]
    if header.adapter is not None:
        rows.append(["adapters", _adapters(found, header.adapter)])
    if header.extras:
        rows.append(["beside the budget", f"{found.extra_weights:,} weights: {_extras(found)}"])
    if header.config:
        rows.append(["configuration", _listed([code(key) for key in header.config])])
    return f"{table(rows)}\n\n{_parts(found)}" if found.tensors else table(rows)


def _adapters(found: Inspection, adapter: Adapter) -> str:
    modules = {adapter.split(tensor.name)[0] for tensor in found.tensors}
    seed = f"initial values of seed {adapter.seed}"
    return f"{code(adapter.kind)} at {len(modules)} modules, {seed}: {_value(adapter.config)}"


def _extras(found: Inspection) -> str:
    return _listed(
        [
            f"{code(extra.name)} {'x'.join(map(str, extra.shape)) or 'scalar'}"
            for extra in found.header.extras.values()
        ]
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*names[:8], *(["..."] if len(names) > 8 else [])])


def _parts(found: Inspection) -> str:
    """Entries by the part of the network that they are in."""
    members: dict[str, list[TensorRecord]] = {}
    adapter = found.header.adapter
    for tensor in found.tensors:
        at = (tensor.name, len(tensor.shape))
        if adapter is not None:
            at = (adapter.split(tensor.name)[0], 2)  # adapters stand at matrices
        members.setdefault(part_of(*at), []).append(tensor)
    rows = [["part", "tensors", "entries", "share", "density", "mean change", "largest"]]
    for part in [part for part in PARTS if part in members]:
        tensors = members[part]
        entries = sum(t.nnz for t in tensors)
        rows.append(
            [
                part,
                str(len(tensors)),
                f"{entries:,}",
                _percent(ratio(entries, found.entries)),
                _percent(ratio(entries, sum(prod(t.shape) for t in tensors))),
                *_sizes(found.changes_in(tensors)),
            ]
        )
    return table(rows, right=range(1, 7))


def _sizes(changes: Changes | None) -> list[str]:
    if changes is None or not changes.known:
        return ["", ""]
    return [f"{changes.mean:.3g}", f"{changes.most:.3g}"]


def _files(facts: Facts) -> str:
    """Budget against metrics, over the family, with what proves that a file is the one meant."""
    names = list(dict.fromkeys(name for file in facts.files for name in file.metrics))
    rows = [["file", "entries", *map(code, names), "size", "sha256"]]
    for file in sorted(facts.files, key=lambda f: (f.found.entries, f.name)):
        values = [file.metrics.get(name) for name in names]
        rows.append(
            [
                code(file.name),
                f"{file.found.entries:,}",
                *("" if value is None else f"{value:.4f}" for value in values),
                format_bytes(file.found.file_bytes),
                code(file.sha256),
            ]
        )
    told = table(rows, right=range(1, 3 + len(names)))
    return f"{told}\n\n{_measured_on(facts)}" if names else told


def _measured_on(facts: Facts) -> str:
    splits = mapping(facts.run.get("splits"))
    count, how = splits.get("validation_rows"), splits.get("how")
    if not isinstance(count, int):
        return "Metrics are those of the training run."
    kind = "of the validation split" if how == "given" else code(how)
    return f"Metrics are those of the training run, on {count:,} examples {kind}."


def _origin(facts: Facts) -> str:
    base = facts.main.found.header.base
    rows = [["", ""]]
    if base is not None:
        rows.append(["base", _named(base)])
        if base.revision is not None:
            rows.append(["revision of the base", code(base.revision)])
        rows.append(["tensors of the base with fingerprints", str(len(base.tensors))])
    seeds = sorted({t.seed for t in facts.main.found.tensors if t.seed is not None})
    if seeds:
        rows.append(["seeds of supports", _listed([str(seed) for seed in seeds])])
    settings = [[code(name), _value(value)] for name, value in _settings(facts).items()]
    if len(rows) == 1 and not settings:
        return "The file records nothing about how it was made."
    return table([*rows, *settings[:_MOST]])


def _settings(facts: Facts) -> dict[str, Any]:
    """What the delta records about its making, and settings and versions of its run."""
    told: dict[str, Any] = {**brief(facts.provenance)}
    for name, value in facts.settings.items():
        if name not in _OF_NO_USE and value not in (None, [], "", {}):
            told.setdefault(name, value)
    versions = mapping(facts.run.get("versions"))
    told |= {f"version of {name}": v for name, v in versions.items() if name != "deltakit"}
    fit: dict[str, Any] = fit_to_travel(told)
    return {name: value for name, value in fit.items() if value not in (None, [], {})}


def _value(value: Any) -> str:
    plain = isinstance(value, str) or not isinstance(value, (Mapping, Sequence))
    text = str(value) if plain else json.dumps(value, ensure_ascii=False, default=_plain)
    return code(_FOLDERS.sub("", text))


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
