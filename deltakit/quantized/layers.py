"""Linear layers that bitsandbytes has quantised: what they are and the weights that they stand for.

Works on its own layers and on those that transformers made (`BitsAndBytesConfig`), and imports
nothing of the library: where nobody has, no layer is of its kind.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from deltakit.errors import ConfigError
from deltakit.quantized.scheme import Quantization


def is_quantised(module: torch.nn.Module) -> bool:
    """Whether a module is a linear layer whose weight bitsandbytes holds as codes."""
    library = sys.modules.get("bitsandbytes.nn")
    if library is None:
        return False
    if isinstance(module, library.Linear4bit):
        return getattr(module.weight, "quant_state", None) is not None
    return isinstance(module, library.Linear8bitLt) and not module.state.has_fp16_weights


def quantised_layers(model: torch.nn.Module) -> dict[str, Any]:
    """Live name of the weight -> layer, for every quantised linear layer, in the model's order."""
    named = model.named_modules()
    return {f"{path}.weight".lstrip("."): each for path, each in named if is_quantised(each)}


def is_transposed(layer: Any) -> bool:
    """Whether the checkpoint holds the weight as [in, out] (transformers' Conv1D)."""
    return getattr(getattr(layer, "source_cls", None), "__name__", "") == "Conv1D"


def stored_shape(layer: Any) -> tuple[int, int]:
    """The shape of the full-precision weight in its checkpoint."""
    shape: tuple[int, int] = (layer.out_features, layer.in_features)
    return shape[::-1] if is_transposed(layer) else shape


def weight_dtype(layer: Any) -> torch.dtype:
    """The dtype of the weight that was quantised; of int8 layers float32 where nobody noted it."""
    state = getattr(layer.weight, "quant_state", None)
    known = getattr(layer, "source_dtype", torch.float32) if state is None else state.dtype
    assert isinstance(known, torch.dtype)
    return known


@torch.no_grad()
def dequantised(layer: Any) -> torch.Tensor:
    """The weight [out, in] that the codes stand for, in `weight_dtype`.

    Raises ConfigError for codes that the library has repacked for inference.
    """
    from bitsandbytes import functional

    state = getattr(layer.weight, "quant_state", None)
    if state is not None:
        if getattr(state, "packing_format_for_cpu", False):
            raise ConfigError(
                "bitsandbytes has repacked the model's 4-bit weights for inference on this CPU; "
                "load the model anew"
            )
        made: torch.Tensor = functional.dequantize_4bit(layer.weight.data, state)
        return made
    codes = layer.weight.data if layer.state.CB is None else layer.state.CB
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    wide: torch.Tensor = functional.int8_vectorwise_dequant(codes, scales)
    return wide.to(weight_dtype(layer))


def quantization_of(model: torch.nn.Module) -> Quantization | None:
    """How a model's first quantised layer is quantised; None for a model without one."""
    layer = next(iter(quantised_layers(model).values()), None)
    if layer is None:
        return None
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return Quantization(kind="int8")
    dtype = layer.compute_dtype or state.dtype
    name = str(dtype).removeprefix("torch.")
    return Quantization(kind=state.quant_type, double=bool(state.nested), compute_dtype=name)
