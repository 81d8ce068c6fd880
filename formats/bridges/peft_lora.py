"""PEFT's LoRA adapters, read as adapters, or as weights: the largest entries of scaling * B @ A."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltakit.delta import SparseDelta
from deltakit.dtypes import Array
from deltakit.errors import ConfigError, FormatError
from deltakit.formats.bridges.bridge import BRIDGES, Bridge, Options, Reading
from deltakit.formats.bridges.names import checkpoint_names
from deltakit.formats.bridges.peft_adapter import Adapter, is_adapter, open_adapter, saved_whole
from deltakit.formats.bridges.peft_reading import read_as_adapter
from deltakit.formats.bridges.peft_settings import check_start
from deltakit.formats.bridges.sparsify import DenseChange, entries_to_keep, sparsified
from deltakit.formats.checkpoint import Checkpoint

_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_BIAS = "lora_B.bias"
_DORA = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
_MARKS = (*_LINEAR, *_EMBEDDING, _BIAS, *_DORA)

_NOT_A_SUM = {  # settings under which the layer is not W + scaling * B @ A
    "use_dora": "DoRA scales the columns of the whole weight, so its change is not low-rank",
    "use_qalora": "QA-LoRA pools the inputs",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only",
    "arrow_config": "an Arrow router mixes adapters by input",
    "use_bdlora": "BD-LoRA has factors in blocks",
    "kasa_config": "KaSA has a singular-value factor",
    "monteclora_config": "MonteCLoRA samples its factors",
    "velora_config": "VeLoRA changes the layer's inputs",
    "target_parameters": "factors of bare parameters are not supported",
    "layer_replication": "replicated layers are not in the base",
    "trainable_token_indices": "trained token rows are not supported",
}


@dataclass(frozen=True, slots=True)
class _Factors:
    """Keys of a module's factors, its scaling, and how B @ A lies in the weight."""

    adapter: Adapter
    a: str
    b: str
    scaling: float
    transposed: bool

    def product(self) -> Array:
        """scaling * B @ A as the weight lies, float32, a convolution's kernel flattened."""
        a, b = (self.adapter.array(key).astype(np.float32) for key in (self.a, self.b))
        product = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
        product *= np.float32(self.scaling)
        return product.T if self.transposed else product


@BRIDGES.register("peft-lora", "PEFT's LoRA adapters", "Hu et al., 2021; PEFT 0.21")
class PeftLora(Bridge):
    """A folder with `<module>.lora_A.weight` [r, in] and `<module>.lora_B.weight` [out, r], of
    linear layers, convolutions and (as lora_embedding_*) embeddings; kept as an adapter, unless
    `form` or a budget asks for weights.

    W becomes W + scaling * B @ A, scaling alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.
    Of that change, computed tensor by tensor in float32, the largest entries over all tensors stay.
    """

    name = "peft-lora"
    sparsifies = True

    def recognise(self, path: Path) -> str | None:
        return is_adapter(path, "LORA", _MARKS, "PEFT LoRA adapter")

    def read(self, path: Path, *, base: Checkpoint | None, options: Options) -> Reading:
        sparse = options.budget is not None or options.density is not None
        if options.form != "weights" and not sparse:
            return read_as_adapter(path, base)
        if options.form == "adapter":
            raise ConfigError(
                "a budget or density is for the change of the weights (--as weights); convert the "
                "adapter whole, then deltakit truncate the result"
            )
        adapter = open_adapter(path, _MARKS)
        _check_settings(adapter)
        touched = [f"{module}.weight" for module in adapter.modules]
        touched += [f"{m}.bias" for m, keys in adapter.modules.items() if _BIAS in keys]
        names = checkpoint_names(touched, base, adapter.saved)
        changes = _changes(adapter, names, base)
        tensors, energy = sparsified(
            changes, entries_to_keep(changes, options, base), options.progress
        )
        extras, notes = saved_whole(adapter, names, base)
        if base is None:
            notes.append("no base was given: the weights are taken to be float32 of the same names")
        delta = SparseDelta(tensors=tensors, extras=extras, base=adapter.identity())
        return Reading(delta, tuple(notes), energy)


def _check_settings(adapter: Adapter) -> None:
    config = adapter.config
    for setting, reason in _NOT_A_SUM.items():
        if config.get(setting):
            raise FormatError(f"{adapter.folder}: {setting}: {reason}; it cannot be converted")
    check_start(config, adapter.folder)
    dora = [module for module, keys in adapter.modules.items() if set(keys) & set(_DORA)]
    if dora:
        raise FormatError(f"module {dora[0]!r}: {_NOT_A_SUM['use_dora']}; it cannot be converted")


def _changes(
    adapter: Adapter, names: Mapping[str, str], base: Checkpoint | None
) -> list[DenseChange]:
    """The changes of all tensors, in tensor order."""
    orientation = _Orientation(adapter, names, base)
    changes = []
    for module, keys in adapter.modules.items():
        found = next((p for p in (_LINEAR, _EMBEDDING) if set(p) <= set(keys)), None)
        if found is None or not set(keys) <= {*found, _BIAS}:
            raise FormatError(
                f"module {module!r} has {', '.join(keys)}, which is no pair of factors"
            )
        a, b = (adapter.file.tensors[keys[mark]].shape for mark in found)
        if len(a) < 2 or len(b) < 2 or b[1] != a[0] or math.prod(b[2:]) != 1:
            raise FormatError(f"module {module!r}: factors {list(a)} and {list(b)} do not fit")
        scaling = scaling_of(adapter.config, module, a[0])
        name = names[f"{module}.weight"]
        transposed = found == _EMBEDDING or orientation.transposed(module)
        factors = _Factors(adapter, keys[found[0]], keys[found[1]], scaling, transposed)
        shape = (a[1], b[0]) if transposed else (b[0], *a[1:])
        changes.append(_change(name, shape, base, factors.product))
        if _BIAS in keys:
            key = keys[_BIAS]
            bias = names[f"{module}.bias"]

            def scaled(key: str = key, scaling: float = scaling) -> Array:
                return adapter.array(key).astype(np.float32) * np.float32(scaling)

            changes.append(_change(bias, (b[0],), base, scaled))
    return sorted(changes, key=lambda change: change.name.encode())


def _change(
    name: str, shape: tuple[int, ...], base: Checkpoint | None, compute: Any
) -> DenseChange:
    if base is None:
        return DenseChange(name, shape, "float32", compute)
    info = base.info(name)
    if info.shape != shape or not info.kind.is_floating:
        raise FormatError(
            f"tensor {name!r}: the factors change {list(shape)}, the base has {info.dtype} "
            f"{list(info.shape)}; is this the base that the adapter was made of?"
        )
    return DenseChange(name, shape, info.dtype, compute)


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r), with the alpha that the config's patterns give the module."""
    alpha = config.get("lora_alpha", 8)
    patterns = config.get("alpha_pattern") or {}
    try:
        hit = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), None)
    except re.error as error:
        raise FormatError(f"alpha_pattern: {error} in a pattern") from None
    if hit is not None:
        alpha = patterns[hit]
    if type(alpha) not in (int, float) or not math.isfinite(alpha) or rank < 1:
        raise FormatError(f"module {module!r}: alpha {alpha!r} and rank {rank} give no scaling")
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


class _Orientation:
    """Which weights lie as [in, out] (transformers' Conv1D).

    The base's shape tells it of weights that are not square. The config's fan_in_fan_out tells it
    of the others, where it does not contradict those: PEFT keeps but one setting for all layers.
    """

    def __init__(self, adapter: Adapter, names: Mapping[str, str], base: Checkpoint | None) -> None:
        self.told: dict[str, bool] = {}
        self.setting = bool(adapter.config.get("fan_in_fan_out"))
        for module, keys in adapter.modules.items():
            if base is None or not set(_LINEAR) <= set(keys):
                continue
            a, b = (adapter.file.tensors[keys[mark]].shape for mark in _LINEAR)
            shape = base.info(names[f"{module}.weight"]).shape
            if len(a) == len(shape) == 2 and a[1] != b[0]:
                self.told[module] = shape == (a[1], b[0])
        self.sure = set(self.told.values()) <= {self.setting}

    def transposed(self, module: str) -> bool:
        if module in self.told:
            return self.told[module]
        if not self.sure:
            raise FormatError(
                f"module {module!r} is square, and the adapter's other layers contradict its "
                f"fan_in_fan_out {self.setting}, so which way it lies is not known; merge the "
                "adapter with PEFT and take `deltakit diff` of the result"
            )
        return self.setting
