"""Writing adapters that PEFT loads: the supports it accepts, its folders, its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deltakit.delta import BaseIdentity, SparseDelta, TensorDelta
from deltakit.dtypes import Array
from deltakit.errors import ConfigError
from deltakit.formats import strict_json
from deltakit.formats.atomic_folder import replacing_folder
from deltakit.formats.bridges import container
from deltakit.formats.bridges.bridge import Options
from deltakit.formats.bridges.peft_adapter import CONFIG, PREFIX, WEIGHTS, Adapter
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.safetensors_file import SafetensorsFile

# A checkpoint does not tell what its matrices are for, and PEFT refuses adapters of other modules
# than nn.Linear when it loads them; these are the names and models that transformers has.
_EMBEDDINGS = {
    "embed_in",
    "embed_positions",
    "embed_tokens",
    "embedding",
    "embeddings",
    "position_embeddings",
    "relative_attention_bias",
    "shared",
    "tok_embeddings",
    "token_type_embeddings",
    "word_embeddings",
    "wpe",
    "wte",
}
_CONV1D = {"decision_transformer", "gpt2", "imagegpt", "openai-gpt"}
_ENTRIES = "deltakit.entries"  # metadata: JSON, live module -> entries before the filling


def linear_weights(
    delta: SparseDelta, base: Checkpoint | None, options: Options, what: str
) -> tuple[dict[str, TensorDelta], list[str]]:
    """Live module -> its tensor, for the weights of linear layers, and notes on what is lost.

    Raises ConfigError for entries elsewhere (biases, normalisations, embeddings) unless
    `options.lossy`, for layers that lie as [in, out], and for rows that grow a tensor.
    """
    config = None if base is None else base.config()
    if config is not None and config.get("model_type") in _CONV1D:
        raise ConfigError(
            f"the layers of a {config['model_type']} are transformers' Conv1D, which {what} of PEFT "
            "does not take"
        )
    if any(name.endswith(":]") for name in delta.extras):
        raise ConfigError(f"the delta appends rows to a tensor, which {what} cannot hold")
    touched = {name: tensor for name, tensor in delta.tensors.items() if tensor.nnz}
    linear = {name: t for name, t in touched.items() if _is_linear(name, t)}
    others = [name for name in touched if name not in linear]
    if others and not options.lossy:
        raise ConfigError(
            f"{what} holds entries of the weights of linear layers alone; {len(others)} tensors "
            f"(such as {others[0]!r}) are something else; --lossy leaves them out"
        )
    if not linear:
        raise ConfigError(f"the delta has no entries in weights of linear layers, for {what}")
    notes = []
    if others:
        lost = sum(touched[name].nnz for name in others)
        notes.append(f"{lost:,} entries in {len(others)} tensors are left out")
    if any(tensor.order is not None for tensor in linear.values()):
        notes.append("the order of unmasking is lost")
    if any(tensor.dtype == "float64" for tensor in linear.values()):
        notes.append("values of float64 tensors are rounded to float32")
    if delta.config:
        notes.append(f"changes of config.json are lost: {', '.join(sorted(delta.config))}")
    modules = {options.prefix + name.removesuffix(".weight"): t for name, t in linear.items()}
    return modules, notes


def _is_linear(name: str, tensor: TensorDelta) -> bool:
    module, _, last = name.rpartition(".")
    is_embedding = module.rpartition(".")[2] in _EMBEDDINGS
    return last == "weight" and len(tensor.shape) == 2 and not is_embedding


def filled(tensor: TensorDelta, count: int, values: Array | None = None) -> tuple[Array, Array]:
    """Indices int64 and values float32, [count]: the entries, then -0.0, which changes no weight,
    at the lowest free positions. values: other values than the tensor's own."""
    more = count - tensor.nnz
    taken = tensor.indices[tensor.indices < count]
    free = np.setdiff1d(np.arange(count), taken, assume_unique=True)[:more]
    given = tensor.values if values is None else values
    added = np.concatenate([given.astype(np.float32), np.full(more, -0.0, np.float32)])
    return np.concatenate([tensor.indices, free]), added


def filling_note(modules: Mapping[str, TensorDelta], counts: Mapping[str, int]) -> list[str]:
    """What was added so that every layer has as many entries as the adapter's config says."""
    entries = sum(tensor.nnz for tensor in modules.values())
    more = sum(counts.values()) - entries
    if not more:
        return []
    return [f"{more:,} entries of -0.0 fill the layers up beside {entries:,}, as the type demands"]


def without_filling(adapter: Adapter, module: str, length: int) -> int:
    """How many entries of a module come before the filling; `length` for files of others."""
    if not isinstance(adapter.file, SafetensorsFile):
        return length
    try:
        known = json.loads(adapter.file.header.metadata.get(_ENTRIES, "{}"))
    except ValueError:
        return length
    count = known.get(module) if isinstance(known, dict) else None
    return count if type(count) is int and 0 <= count <= length else length


def write_adapter(
    path: Path,
    config: Mapping[str, Any],
    arrays: Mapping[str, Array],
    delta: SparseDelta,
    modules: Mapping[str, TensorDelta],
    base: Checkpoint | None,
    options: Options,
) -> None:
    """Write an adapter's folder: `arrays` by live key, and the delta's extras saved whole.

    Extras that the base has get the prefix; a new head stands outside the model that has it.
    """
    known = delta.base or BaseIdentity()
    inside = set() if base is None else set(base.tensors)
    extras = {
        options.prefix + name if name in inside else name: array
        for name, array in delta.extras.items()
    }
    heads = sorted({name.rpartition(".")[0] for name in extras})
    if "" in heads:
        raise ConfigError("the delta has an extra outside of any module, which PEFT cannot save")
    content = {
        "base_model_name_or_path": known.model_id,
        "revision": known.revision,
        "inference_mode": True,
        "task_type": None,
        "target_modules": sorted(modules),
        "modules_to_save": heads or None,
        **config,
    }
    keyed = {f"{PREFIX}{key}": array for key, array in {**arrays, **extras}.items()}
    entries = strict_json.dumps({module: tensor.nnz for module, tensor in modules.items()})
    with replacing_folder(path) as folder:
        (folder / CONFIG).write_text(strict_json.dumps(content) + "\n", encoding="utf-8")
        weights = container.encode(keyed, {"format": "pt", _ENTRIES: entries})
        (folder / WEIGHTS).write_bytes(weights)
