"""Tensors that are one in the model and two in a state dict, such as tied embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from deltakit.formats.checkpoint import Checkpoint

_WINDOW = 2**20  # elements that are compared at a time


def tied(
    base: Checkpoint, tuned: Checkpoint, shared: Sequence[str], added: Sequence[str]
) -> dict[str, str]:
    """Which of the tensors that only `tuned` has are others of it again: name -> the shared tensor.

    torch.distributed.checkpoint saves a tied tensor under each of its names, where safetensors hold
    it once. So of such a directory a matrix counts as tied if it is bit for bit a tensor that the base
    has, unless the base's config.json says `tie_word_embeddings: false`. Of other checkpoints none
    does.
    """
    if not tuned.is_dcp or (base.config() or {}).get("tie_word_embeddings") is False:
        return {}
    found: dict[str, str] = {}
    for name in added:
        shape = tuned.tensors[name].shape
        if len(shape) > 1 and 0 not in shape:
            twin = next((other for other in shared if _are_equal(tuned, name, other)), None)
            found |= {} if twin is None else {name: twin}
    return found


def _are_equal(tuned: Checkpoint, name: str, other: str) -> bool:
    info, twin = tuned.tensors[name], tuned.tensors[other]
    if (info.shape, info.dtype) != (twin.shape, twin.dtype):
        return False
    return all(
        (tuned.read(name, at, at + _WINDOW) == tuned.read(other, at, at + _WINDOW)).all()
        for at in range(0, info.numel, _WINDOW)
    )
