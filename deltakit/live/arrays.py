"""Between torch tensors and NumPy arrays, bit for bit, bfloat16 included."""

from __future__ import annotations

import numpy as np
import torch

from deltakit.dtypes import Array, dtype

_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_name(tensor: torch.Tensor) -> str:
    """torch's name of a tensor's dtype: "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def to_numpy(tensor: torch.Tensor) -> Array:
    """A NumPy array of the same shape, dtype and bits as a tensor on any device."""
    kind = dtype(dtype_name(tensor))
    plain = tensor.detach().cpu().contiguous()
    if plain.ndim == 0:
        return to_numpy(plain.reshape(1)).reshape(())
    return np.asarray(plain.view(_AS_INTEGER[kind.itemsize]).numpy().view(kind.numpy))


def to_torch(array: Array) -> torch.Tensor:
    """A CPU tensor of the same shape, dtype and bits as a NumPy array; the bits are copied."""
    from deltakit.dtypes import dtype_of

    kind = dtype_of(array)
    words = np.array(array, order="C").view(kind.words)  # a copy: torch must not alias a file map
    signed = words.view(np.uint8 if kind.itemsize == 1 else f"<i{kind.itemsize}")
    return torch.from_numpy(signed).view(getattr(torch, kind.name)).reshape(array.shape)
