"""docs/settings.md, made from the declarations of the settings and from the registries.

python -m deltakit.training.settings_doc > docs/settings.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import fields

import yaml

from deltakit.budget import ALLOCATIONS
from deltakit.selection import HEURISTICS, METHODS
from deltakit.selection.recipe import settings_of
from deltakit.selection.schedules import SCHEDULES
from deltakit.targets.preset_names import TARGET_PRESETS
from deltakit.training.config import REQUIRED, TrainConfig, describe
from deltakit.training.config_method import METHOD_SETTINGS
from deltakit.training.peers import PEERS
from deltakit.training.presets import PRESETS


def settings_markdown() -> str:
    """Tables of all settings per group, of what their names stand for, and of the presets."""
    lines = ["# Settings of `deltakit train`", ""]
    lines += ["Each is a name in CONFIG.yaml and a flag: `max_length` is `--max-length`.", ""]
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    group = ""
    for name, setting in describe().items():
        if setting.group != group:
            group = setting.group
            lines += ["", f"## {group}", "", "| setting | value | default | |", "|---|---|---|---|"]
        value = setting.kind.metavar.replace("|", " or ")
        default = "required" if name in REQUIRED else _shown(defaults[name])
        lines.append(f"| `{name}` | {value} | {default} | {setting.about} |")
    lines += _methods()
    heuristics = ((r.name, r.summary, r.source) for r in HEURISTICS)
    lines += _table("Heuristics", ("heuristic", "favours", "source"), heuristics)
    schedules = ((r.name, r.summary, r.source) for r in SCHEDULES)
    lines += _table("Schedules", ("schedule", "unmasks", "source"), schedules)
    lines += _table("Allocations", ("allocation", "shares the budget"), ALLOCATIONS.items())
    lines += _table("Target presets", ("pattern", "stands for"), TARGET_PRESETS.items())
    peers = ((r.name, r.summary, r.source) for r in PEERS)
    lines += _table("Peers of `--compare`", ("peer", "trains", "source"), peers)
    lines += ["", "## Presets", ""]
    for name, preset in PRESETS.items():
        shown = ", ".join(f"{key} {_shown(value)}" for key, value in preset.items())
        lines.append(f"- `{name}`: {shown}")
    return "\n".join(lines) + "\n"


def _methods() -> list[str]:
    """The methods with the settings above that each takes; the seed belongs to the whole run."""
    rows = []
    for record in METHODS:
        mine = [name for name in settings_of(record.name) if name in METHOD_SETTINGS]
        taken = ", ".join(f"`{name}`" for name in mine)
        rows.append((record.name, record.summary, record.source, taken))
    return _table("Methods", ("method", "trains", "source", "settings"), rows)


def _table(title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A section with one row per name, which comes first."""
    head = list(columns)
    lines = ["", f"## {title}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| `{name}` | {' | '.join(rest)} |" for name, *rest in rows)]


def _shown(value: object) -> str:
    if value is None or value == ():
        return ""
    text = yaml.safe_dump([value], default_flow_style=True, width=10**9).strip()[1:-1]
    return f"`{text}`"


if __name__ == "__main__":
    sys.stdout.write(settings_markdown())
