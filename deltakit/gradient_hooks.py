"""Hooks on gradients, with the types that torch leaves out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle


def on_gradient(
    tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]
) -> RemovableHandle:
    """Let every gradient that reaches `tensor` be replaced by `change(gradient)`."""
    register: Any = tensor.register_hook
    handle: RemovableHandle = register(change)
    return handle


def after_accumulation(
    parameter: torch.nn.Parameter, take: Callable[[torch.Tensor], None]
) -> RemovableHandle:
    """Call `take(parameter)` whenever backward has added to its `.grad`.

    The parameter must require gradients.
    """
    register: Any = parameter.register_post_accumulate_grad_hook
    handle: RemovableHandle = register(take)
    return handle
