"""bitsandbytes' linear layers as training needs them. Importing this needs the library.

The library's own forward casts the bias in place to the dtype of computing, for good, and repacks
the codes of 4-bit layers for inference on some CPUs, again for good; both would change what a delta
says it left alone.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from bitsandbytes.autograd._functions import matmul, matmul_4bit
from bitsandbytes.nn import modules

# Says at every single product that its inputs are cast to float16, as LLM.int8() does.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


class Linear4bit(modules.Linear4bit):
    """y = dequantised(W) x + b, computed in `compute_dtype`; W's codes and b stay as they are."""

    source_cls: type

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """inputs [..., in] of any floating dtype -> [..., out] of the same."""
        weight: Any = self.weight
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        made: torch.Tensor = matmul_4bit(
            x.to(self.compute_dtype), weight, quant_state=weight.quant_state, bias=bias
        )
        return made.to(x.dtype)


class Linear8bitLt(modules.Linear8bitLt):
    """y = W x + b as LLM.int8() computes it; on CPUs in training, dequantised(W) x + b."""

    source_cls: type
    source_dtype: torch.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """inputs [..., in] of any floating dtype -> [..., out] of the same."""
        self.state.is_training = self.training
        weight: Any = self.weight
        if weight.CB is not None:
            self.init_8bit_state()  # type: ignore[no-untyped-call]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        made: torch.Tensor = matmul(x, weight, bias=bias, state=self.state)
        return made


def quantised_linear(
    weight: torch.Tensor,
    bias: torch.nn.Parameter | None,
    kind: str,
    *,
    double: bool,
    compute_dtype: torch.dtype,
) -> Any:
    """A layer with the quantised weight [out, in], on its device, and the bias itself, [out]."""
    height, width = weight.shape
    layer: Any
    codes: Any
    if kind == "int8":
        layer = Linear8bitLt(
            width, height, bias=False, has_fp16_weights=False, threshold=6.0, device="meta"
        )
        layer.source_dtype = weight.dtype
        # Quantised on the CPU whatever the device: the library asks for that.
        codes = modules.Int8Params(weight.detach().cpu(), requires_grad=False)
    else:
        layer = Linear4bit(  # type: ignore[no-untyped-call]
            width, height, bias=False, compute_dtype=compute_dtype, quant_type=kind, device="meta"
        )
        codes = modules.Params4bit(
            weight.detach(), quant_type=kind, compress_statistics=double, module=layer
        )
    layer.weight = codes.to(weight.device)
    layer.bias = bias
    return layer
