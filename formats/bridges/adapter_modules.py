"""Adapters as plain tensors with a description beside them, for kinds that PEFT does not have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltakit.adapters.fold_delta import computed_from
from deltakit.adapters.initial import trained_values
from deltakit.adapters.kinds import KINDS
from deltakit.delta import BaseIdentity, SparseDelta
from deltakit.dtypes import Array
from deltakit.errors import DeltakitError, FormatError
from deltakit.formats import strict_json
from deltakit.formats.atomic_folder import replacing_folder
from deltakit.formats.bridges import container
from deltakit.formats.bridges.adapter_entries import check_floats, from_constants
from deltakit.formats.bridges.bridge import BRIDGES, Bridge, Options, Reading
from deltakit.formats.bridges.peft_adapter import MAX_CONFIG
from deltakit.formats.bridges.peft_recorded import from_seed, initial_of
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.safetensors_file import SafetensorsFile

DESCRIPTION = "adapter.json"
TENSORS = "adapter.safetensors"
_FORMAT = "deltakit adapter modules"
_MEMBERS = {
    *("format", "version", "kind", "config", "initial", "parameters"),
    *("base_model_name_or_path", "revision", "config_changes"),
}


@BRIDGES.register("adapter-modules", "adapters of any kind as plain tensors and a description")
class AdapterModules(Bridge):
    """A folder with adapter.safetensors, `<module>.<parameter>` by the base's own names and extras
    under theirs, and adapter.json: kind, config, names of the parameters, and what gives the initial
    values, without which all the tensors are complete as well.
    """

    name = "adapter-modules"
    holds = "adapters"

    def recognise(self, path: Path) -> str | None:
        try:
            description = _described(path)
        except (OSError, DeltakitError):
            return None
        return f"modules of adapter {description['kind']!r}"

    def read(self, path: Path, *, base: Checkpoint | None, options: Options) -> Reading:
        told = _described(path)
        kind, config, parameters = _checked(told, path)
        file = SafetensorsFile(_folder(path) / TENSORS)
        values, of, extras = {}, {}, {}
        for name, info in file.tensors.items():
            array = file.read(name).view(info.kind.numpy).reshape(info.shape)
            fitting = [p for p in parameters if name.endswith(f".{p}")]
            if fitting:
                values[name], of[name] = array, max(fitting, key=len)
            else:
                extras[name] = array
        check_floats(values)
        if not values:
            raise FormatError(f"{file.path} holds no {' or '.join(sorted(parameters))}")
        made = from_seed(kind, config, told.get("initial") or {}, values, base)
        if made is None and config.get("frozen"):
            raise FormatError(
                f"{_folder(path)}: adapter {kind!r} holds values that its seed gives, and "
                f"{DESCRIPTION} has another one"
            )
        adapter, tensors = made or from_constants(kind, config, values, of)
        known = (told.get(key) for key in ("base_model_name_or_path", "revision"))
        model_id, revision = (name if isinstance(name, str) else None for name in known)
        delta = SparseDelta(
            tensors=tensors,
            extras=extras,
            base=BaseIdentity(model_id=model_id, revision=revision),
            config=_object(told.get("config_changes"), path),
            adapter=adapter,
        )
        return Reading(delta)

    def write(
        self, delta: SparseDelta, path: Path, *, base: Checkpoint | None, options: Options
    ) -> tuple[str, ...]:
        adapter = delta.adapter
        assert adapter is not None  # by `holds`
        values: dict[str, Array] = trained_values(delta, computed_from(delta, base))
        known = delta.base or BaseIdentity()
        content = {
            "format": _FORMAT,
            "version": 1,
            "kind": adapter.kind,
            "config": dict(adapter.config),
            "parameters": sorted(adapter.initial),
            "initial": initial_of(adapter),
            "base_model_name_or_path": known.model_id,
            "revision": known.revision,
            "config_changes": dict(delta.config),
        }
        with replacing_folder(path) as folder:
            (folder / DESCRIPTION).write_text(strict_json.dumps(content) + "\n", encoding="utf-8")
            (folder / TENSORS).write_bytes(container.encode({**values, **delta.extras}, {}))
        ordered = any(tensor.order is not None for tensor in delta.tensors.values())
        return ("the order of unmasking is lost",) if ordered else ()


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _described(path: Path) -> Mapping[str, Any]:
    file = _folder(path) / DESCRIPTION
    if path.is_file() and path.name not in (DESCRIPTION, TENSORS):
        raise FormatError(f"{path} is no {DESCRIPTION}")
    if not file.is_file() or file.stat().st_size > MAX_CONFIG:
        raise FormatError(f"{file} is missing or too large")
    content = strict_json.loads(file.read_bytes(), str(file))
    if not isinstance(content, dict) or content.get("format") != _FORMAT or "kind" not in content:
        raise FormatError(f"{file} does not describe modules of an adapter")
    return content


def _checked(told: Mapping[str, Any], path: Path) -> tuple[str, dict[str, Any], list[str]]:
    """Kind, config and parameters of a description; FormatError for what they cannot be."""
    strange = sorted(set(told) - _MEMBERS)
    if told.get("version") != 1 or strange:
        what = f"member {strange[0]!r}" if strange else f"version {told.get('version')!r}"
        raise FormatError(f"{path}: {DESCRIPTION} has {what}, which this reader does not know")
    kind, parameters = told["kind"], told.get("parameters")
    if kind not in KINDS.names():
        raise FormatError(f"{path}: adapter {kind!r} is none of {', '.join(KINDS.names())}")
    if not isinstance(parameters, list) or not all(isinstance(p, str) and p for p in parameters):
        raise FormatError(f"{path}: parameters in {DESCRIPTION} are no list of names")
    return kind, _object(told.get("config"), path), parameters


def _object(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"{path}: {DESCRIPTION} has {value!r} where an object is expected")
    return value
