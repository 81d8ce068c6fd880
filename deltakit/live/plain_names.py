"""Names of a model's tensors as they are without the adapters that stand in it.

peft puts an adapter into a module of its own, which holds the one that it stands for as its child
`base_layer`; bottleneck adapters are children of the layers that they stand at.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_INNER = "base_layer"
_CHILD = "BottleneckAdapter"  # class of the adapters that are children


def plain_names(model: torch.nn.Module) -> Callable[[str], str | None]:
    """Live name -> the name without adapters, None for what belongs to an adapter."""
    modules = dict(model.named_modules(remove_duplicate=False))
    wrappers = {path for path, module in modules.items() if _INNER in module._modules}
    children = {path for path, module in modules.items() if type(module).__name__ == _CHILD}

    def plain(name: str) -> str | None:
        kept: list[str] = []
        path = ""
        for part in name.split("."):
            inside = path in wrappers
            path = f"{path}.{part}" if path else part
            if path in children:
                return None
            if not inside:
                kept.append(part)
            elif part != _INNER:
                return None
        return ".".join(kept)

    return plain if wrappers or children else lambda name: name
