"""Where a run's settings come from: defaults, preset, configuration file and flags, in layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deltakit.errors import ConfigError, MissingFileError, nearest
from deltakit.formats.atomic import write_bytes
from deltakit.training.config import TrainConfig, check_names, describe
from deltakit.training.presets import PRESETS


def resolve(file: Mapping[str, Any], flags: Mapping[str, Any]) -> TrainConfig:
    """The settings of a run; each layer overrules those before it.

    Layers: defaults, the preset, the file, flags. A flag that changes the preset (or the method or adapter,
    which change the preset) also puts away what the file says of the old preset's settings.
    None means "not given".
    """
    file = {name: value for name, value in file.items() if value is not None}
    flags = {name: value for name, value in flags.items() if value is not None}
    check_names(flags, "flags")
    name = _preset_name(file, flags)
    preset = _preset(name, flags.get("method", file.get("method")))
    before = _preset_name(file, {})
    if flags and name != before:
        replaced = {*PRESETS.get(before, {}), "preset", "method"}
        file = {key: value for key, value in file.items() if key not in replaced}
        settings = {**file, **preset, **flags}
    else:
        settings = {**preset, **file, **flags}
    return TrainConfig(**{**settings, "preset": name})


def read_file(path: str | Path) -> dict[str, Any]:
    """The settings named in a YAML file; ConfigError for anything that is no known setting."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise MissingFileError(f"cannot read configuration {path}: {reason}") from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(f"{path}{line}: {problem}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected settings as `name: value`, found {type(content)}")
    check_names(content, str(path))
    return content


def render(config: TrainConfig, notes: Mapping[str, str] | None = None) -> str:
    """The settings as a YAML file with their help beside, reusable as CONFIG.

    notes: what to say beside a setting in place of its help.
    """
    lines = ["# deltakit train: the settings of this run, all of them\n"]
    group = ""
    described = describe()
    for name, value in config.as_dict().items():
        if described[name].group != group:
            group = described[name].group
            lines.append(f"\n# {group}\n")
        shown = yaml.safe_dump([value], default_flow_style=True, width=10**9).rstrip()[1:-1]
        about = (notes or {}).get(name, described[name].about)
        lines.append(f"{name}: {shown}  # {about}\n")
    return "".join(lines)


def write_file(
    config: TrainConfig, path: str | Path, notes: Mapping[str, str] | None = None
) -> None:
    """Save the settings atomically; notes: see `render`."""
    write_bytes(path, render(config, notes).encode())


def _preset_name(file: Mapping[str, Any], flags: Mapping[str, Any]) -> str:
    if "preset" in flags:
        return str(flags["preset"])
    method = flags.get("method", file.get("method", "id3"))
    adapter = flags.get("adapter", file.get("adapter"))
    usual = f"{method}-{'default' if adapter is None else 'adapter'}"
    default = usual if usual in PRESETS else "none"
    if "method" in flags and flags["method"] != file.get("method", flags["method"]):
        return default
    if adapter is not None and file.get("preset") == f"{method}-default":
        return default  # those settings are for weights of the base
    return str(file.get("preset", default))


def _preset(name: str, method: str | None) -> dict[str, Any]:
    if name == "none":
        return {}
    if name not in PRESETS:
        hint = nearest(name, list(PRESETS)) or f"; known: {', '.join(PRESETS)}, none"
        raise ConfigError(f"unknown preset {name!r}{hint}")
    preset = PRESETS[name]
    if method is not None and method != preset["method"]:
        raise ConfigError(
            f"preset {name} is for method {preset['method']}, but method is {method}; "
            "leave one of them out"
        )
    return preset
