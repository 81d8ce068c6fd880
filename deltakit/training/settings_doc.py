"""docs/settings.md, made from the declarations of the settings.

python -m deltakit.training.settings_doc > docs/settings.md
"""

from __future__ import annotations

import sys
from dataclasses import fields

import yaml

from deltakit.training.config import REQUIRED, TrainConfig, describe
from deltakit.training.presets import PRESETS


def settings_markdown() -> str:
    """A table of all settings per group, then the presets."""
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
    lines += ["", "## Presets", ""]
    for name, preset in PRESETS.items():
        shown = ", ".join(f"{key} {_shown(value)}" for key, value in preset.items())
        lines.append(f"- `{name}`: {shown}")
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    if value is None or value == ():
        return ""
    text = yaml.safe_dump([value], default_flow_style=True, width=10**9).strip()[1:-1]
    return f"`{text}`"


if __name__ == "__main__":
    sys.stdout.write(settings_markdown())
