"""Quantising the linear layers of a loaded model in place.

Layers are replaced one by one after loading, rather than while transformers loads them: plain
modules work too, the codes are those of the very weights that a delta's base holds, and for the
Trainer the model stays what it was. The price is that the model is loaded in full precision first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from deltakit.errors import ConfigError
from deltakit.quantized.scheme import Quantization
from deltakit.targets.patterns import matching
from deltakit.targets.roles import is_a, roles

_FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def quantize_model(
    model: torch.nn.Module,
    how: Quantization,
    *,
    skip: str | Iterable[str] = (),
    new: Iterable[str] = (),
) -> torch.nn.Module:
    """Replace linear layers (`nn.Linear`, transformers' `Conv1D`) by quantised ones; returns model.

    As transformers has it, heads, the output layer, the last module, tied weights and modules that
    a model wants in float32 stay as they are; skip: patterns (`targets.patterns.matching`) for
    weights that shall stay too; new: live names of weights that the base lacks, which stay.
    Raises ConfigError where bitsandbytes is missing or no layer is left.
    """
    try:
        from deltakit.quantized.library import quantised_linear
    except ImportError:
        raise ConfigError(
            "quantised bases need bitsandbytes: pip install 'deltakit-sparse[8bit]'"
        ) from None
    kept = {*_kept(model), *new, *matching(skip, _names(model), "skip pattern", model)}
    found = {
        f"{path}.weight": module
        for path, module in model.named_modules()
        if path and (type(module) is torch.nn.Linear or type(module).__name__ == "Conv1D")
    }
    chosen = {n: m for n, m in found.items() if n not in kept and m.weight.dtype in _FLOATING}
    if not chosen:
        raise ConfigError(
            f"{type(model).__name__} has no linear layer of float32 or 16 bits that can be "
            f"quantised: {len(found)} in all, heads and tied ones stay as they are"
        )
    for name, module in chosen.items():
        weight: Any = module.weight
        own = weight.dtype if how.compute_dtype is None else getattr(torch, how.compute_dtype)
        layer = quantised_linear(
            weight.t().contiguous() if is_a(module, "Conv1D") else weight,
            module.bias,
            how.kind,
            double=how.double,
            compute_dtype=own,
        )
        layer.source_cls = type(module)
        layer.train(module.training)
        model.set_submodule(name.removesuffix(".weight"), layer)
    setattr(model, f"is_loaded_in_{'8' if how.kind == 'int8' else '4'}bit", True)  # peft asks
    return model


def _names(model: torch.nn.Module) -> dict[str, str | None]:
    return {name: name for name, _ in model.named_parameters()}


def _kept(model: torch.nn.Module) -> set[str]:
    """Live names of the weights that stay as they are."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    named = dict(model.named_parameters(remove_duplicate=False))
    kept = {name for name, parameter in named.items() if uses[id(parameter)] > 1}
    kept |= {name for name, role in roles(model).items() if role.kind == "head"}
    outputs: Any = getattr(model, "get_output_embeddings", lambda: None)()
    kept |= {name for name, p in named.items() if p is getattr(outputs, "weight", None)}
    kept.add(f"{list(named)[-1].rpartition('.')[0]}.weight")
    wide = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return kept | {name for name in named if wide & set(name.split("."))}
