"""What `save_pretrained` makes of a model's tensors: names and regions, read off without data.

transformers rearranges the weights of some architectures as it loads them (experts fused into 3-D
tensors) and undoes that as it saves. Tensors without data go through the library's own way back
while every copy it makes is written down; what they become is then known by their storages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deltakit.live.regions import Region, View

_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
_Part = tuple[torch.Tensor, torch.Tensor]  # a view of a source, the view that it was copied to


class _Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down which views were copied into the fresh storages that operations return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts: dict[int, list[_Part]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _COPIES:
            self.parts[_storage(result)] = [(args[0], result)]
        elif func is torch.ops.aten.cat.default:
            axis = args[1] if len(args) > 1 else 0
            into = result.split([part.shape[axis] for part in args[0]], axis)
            self.parts[_storage(result)] = list(zip(args[0], into, strict=True))
        elif func is torch.ops.aten.stack.default:
            axis = args[1] if len(args) > 1 else 0
            self.parts[_storage(result)] = list(zip(args[0], result.unbind(axis), strict=True))
        return result


def saved_regions(model: Any, live: Mapping[str, torch.Tensor]) -> dict[str, list[Region]]:
    """Name in a saved checkpoint -> the regions of live tensors that it is made of.

    live: names, with all names of tied ones, to tensors, of which only the shapes matter. Tensors
    that the library computes rather than rearranges (quantised ones) are left out.
    """
    from transformers.core_model_loading import revert_weight_conversion

    marks = {name: torch.empty(tensor.shape, device="meta") for name, tensor in live.items()}
    known = {_storage(mark): name for name, mark in marks.items()}
    with _Copies() as copies:
        saved = revert_weight_conversion(model, dict(marks))
    found = {}
    for name, tensor in saved.items():
        whole = torch.empty(tensor.shape, device="meta")
        paths = _paths(tensor, whole, known, copies.parts)
        found[name] = [
            Region(n, tuple(live[n].shape), name, tuple(tensor.shape), hops) for n, hops in paths
        ]
    return found


def _paths(
    source: torch.Tensor,
    target: torch.Tensor,
    known: Mapping[int, str],
    parts: Mapping[int, list[_Part]],
) -> list[tuple[str, tuple[tuple[View, View], ...]]]:
    """All ways from a live tensor through copies to `target`, which holds a copy of `source`."""
    hop = (_view(source), _view(target))
    if _storage(source) in known:
        return [(known[_storage(source)], (hop,))]
    earlier = [_paths(*part, known, parts) for part in parts.get(_storage(source), [])]
    return [(name, (*hops, hop)) for paths in earlier for name, hops in paths]


def _view(tensor: torch.Tensor) -> View:
    return View(int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
