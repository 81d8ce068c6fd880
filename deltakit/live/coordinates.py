"""Between live parameters and the tensors of the checkpoint they were loaded from.

A delta speaks of the checkpoint: its names, shapes and flat indices. A live model may carry a
prefix that the checkpoint lacks (a `BertModel` checkpoint in a classifier), or lack one, and
transformers renames the modules of some architectures when it loads them (ViT).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from deltakit.errors import CoordinateError
from deltakit.formats.checkpoint import Checkpoint

_OLD_ENDINGS = ((".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta"))
_CONFIG_KEYS = ("architectures", "id2label", "label2id", "problem_type", "vocab_size")


def find_checkpoint(model: torch.nn.Module) -> Checkpoint | None:
    """The local checkpoint that `from_pretrained` loaded the model from, where there is one."""
    path = getattr(model, "name_or_path", "")
    return Checkpoint(path) if path and Path(path).is_dir() else None


def saved_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Live name -> buffer, for the buffers that checkpoints hold (BatchNorm statistics)."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def live_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All that a checkpoint of the model holds, by live name: parameters, then saved buffers."""
    return {**dict(model.named_parameters()), **saved_buffers(model)}


def checkpoint_names(
    model: torch.nn.Module, checkpoint: Checkpoint | None, *, buffers: bool = False
) -> dict[str, str | None]:
    """Live name -> name in the checkpoint; None for what the checkpoint lacks.

    Names of parameters in the model's order, tied ones once, then of saved buffers if asked.
    Without a checkpoint the live names are the coordinates. Raises CoordinateError where names
    match and shapes differ.
    """
    live = live_tensors(model) if buffers else dict[str, torch.Tensor](model.named_parameters())
    if checkpoint is None:
        return {name: name for name in live}
    prefix = getattr(model, "base_model_prefix", "")
    saved = _saved_names(model, live)
    names = {n: _resolve((n, saved.get(n, n)), prefix, checkpoint) for n in live}
    for name, stored in names.items():
        if stored is not None and tuple(checkpoint.tensors[stored].shape) != live[name].shape:
            raise CoordinateError(
                f"live tensor {name!r} has shape {list(live[name].shape)}, but {stored!r} in "
                f"the checkpoint has {list(checkpoint.tensors[stored].shape)}; load the model as "
                "its checkpoint describes it"
            )
    return names


def _saved_names(model: Any, live: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Live name -> name under which `save_pretrained` writes the tensor, where it is kept whole.

    Tensors without data go through the library's own conversion, and are known again by identity.
    """
    if not hasattr(model, "save_pretrained"):
        return {}
    from transformers.core_model_loading import revert_weight_conversion

    marks = {name: torch.empty_like(tensor, device="meta") for name, tensor in live.items()}
    known = {id(mark): name for name, mark in marks.items()}
    saved = revert_weight_conversion(model, marks)
    return {known[id(mark)]: name for name, mark in saved.items() if id(mark) in known}


def _resolve(names: Sequence[str], prefix: str, checkpoint: Checkpoint) -> str | None:
    candidates = list(dict.fromkeys(names))
    if prefix:
        candidates += [name.removeprefix(f"{prefix}.") for name in names]
        candidates += [f"{prefix}.{name}" for name in names]
    for new, old in _OLD_ENDINGS:
        candidates += [c.removesuffix(new) + old for c in candidates if c.endswith(new)]
    return next((c for c in candidates if c in checkpoint.tensors), None)


def config_changes(model: torch.nn.Module, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """What a config.json must say so that the model's class and head are loaded again.

    Empty for models without a config and for bases without a config.json.
    """
    config: Any = getattr(model, "config", None)
    if checkpoint is None or checkpoint.directory is None or not hasattr(config, "to_dict"):
        return {}
    path = Path(os.fspath(checkpoint.directory)) / "config.json"
    if not path.is_file():
        return {}
    old: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    new = json.loads(json.dumps(config.to_dict()))
    new["architectures"] = [type(model).__name__]
    return {key: new[key] for key in _CONFIG_KEYS if key in new and new[key] != old.get(key)}
