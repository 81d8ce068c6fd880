"""Launching a kernel where its tensors are."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch


def launch(
    kernel: Any, grid: tuple[int, ...], tensor: torch.Tensor, *rest: Any, fuse: bool, **sizes: int
) -> None:
    """Run a Triton kernel over a grid of programs; its arguments begin with a tensor.

    It runs on that tensor's device, which need not be the current one. fuse: whether products may
    be fused with the sums they go into. sizes: what the kernel is compiled for.
    """
    with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
        kernel[grid](tensor, *rest, enable_fp_fusion=fuse, **sizes)
