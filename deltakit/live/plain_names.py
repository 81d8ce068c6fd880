"""Names of a model's tensors as they are without the adapters that stand in it.

A module that an adapter stands at holds the one that it stands for as its child `base_layer`: so
does peft, and so do the bottlenecks of deltakit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_INNER = "base_layer"


def plain_names(model: torch.nn.Module) -> Callable[[str], str | None]:
    """Live name -> the name without adapters, None for what belongs to an adapter."""
    wrappers = {
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if _INNER in module._modules
    }

    def plain(name: str) -> str | None:
        kept: list[str] = []
        path = ""
        for part in name.split("."):
            inside = path in wrappers
            path = f"{path}.{part}" if path else part
            if not inside:
                kept.append(part)
            elif part != _INNER:
                return None
        return ".".join(kept)

    return plain if wrappers else lambda name: name
