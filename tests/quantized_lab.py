"""Quantised checkpoints for tests, what bitsandbytes reads in them, and deltas for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from bitsandbytes import functional
from merge_reference import adding
from safetensors.torch import save_file

from deltakit.delta import TensorDelta

Tensors = dict[str, torch.Tensor]
SCHEMES = ("nf4", "nf4-double", "fp4", "int8")
SHAPE = (90, 200)  # several blocks of 64, the last one short, and two blocks of scales


def quantize(scheme: str, weight: torch.Tensor, name: str = "w.weight") -> Tensors:
    """The tensors that bitsandbytes' linear layers store for `weight`."""
    if scheme == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return {name: codes, name.removesuffix("weight") + "SCB": scales}
    kind, _, double = scheme.partition("-")
    codes, state = functional.quantize_4bit(
        weight, quant_type=kind, compress_statistics=bool(double)
    )
    return {name: codes} | {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}


def dequantize(stored: Tensors, name: str = "w.weight") -> torch.Tensor:
    """The weight that bitsandbytes reads in stored tensors."""
    if name.removesuffix("weight") + "SCB" in stored:
        scales = stored[name.removesuffix("weight") + "SCB"]
        return functional.int8_vectorwise_dequant(stored[name], scales)
    parts = {k: v for k, v in stored.items() if k.startswith(f"{name}.")}
    state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    return functional.dequantize_4bit(stored[name], state)


def written(path: Path, scheme: str, shape: tuple[int, ...] = SHAPE) -> Path:
    """A file with the quantised tensor "w.weight" and the plain one "norm.weight", bfloat16."""
    torch.manual_seed(0)
    stored = quantize(scheme, (0.02 * torch.randn(shape)).bfloat16())
    save_file({**stored, "norm.weight": torch.ones(7, dtype=torch.bfloat16)}, path)
    return path


def entries(
    std: float, count: int = 60, dtype: Any = ml_dtypes.bfloat16, shape: tuple[int, ...] = SHAPE
) -> TensorDelta:
    rng = np.random.default_rng(3)
    found = adding("w.weight", np.zeros(shape, dtype), rng, count)
    return TensorDelta(
        name="w.weight",
        shape=shape,
        dtype=found.dtype,
        mode="add",
        indices=found.indices,
        values=found.values * std,
    )


def plus(weight: torch.Tensor, delta: TensorDelta, dtype: torch.dtype) -> torch.Tensor:
    """The entries of a dense weight, cast to `dtype`, with the delta added in float32."""
    flat, at = weight.clone().reshape(-1), torch.from_numpy(delta.indices)
    summed = flat[at].to(dtype).float() + torch.from_numpy(delta.values)
    flat[at] = summed.to(dtype).to(flat.dtype)
    return flat.reshape(weight.shape)
