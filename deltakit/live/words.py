"""Reading and writing single weights of live tensors as raw words."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from deltakit.dtypes import Array
from deltakit.errors import CoordinateError
from deltakit.live.arrays import dtype_name
from deltakit.quantized.stand_in import StandIn

_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WORTH_A_THREAD = 50_000  # entries; starting a thread takes as long as writing some thousands


def flat_words(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A live tensor's raw words as a flat integer view that shares its memory.

    Raises CoordinateError for a tensor that is not contiguous.
    """
    if not tensor.is_contiguous():
        raise CoordinateError(f"tensor {name!r} is not contiguous in the model")
    return tensor.data.view(-1).view(_AS_INTEGER[tensor.element_size()])


def word_tensor(words: Array, device: torch.device) -> torch.Tensor:
    """NumPy words [n] as a tensor of the integers of `flat_words`; on the CPU memory is shared."""
    size = words.itemsize
    return torch.from_numpy(words if size == 1 else words.view(f"<i{size}")).to(device)


def read_words(name: str, tensor: torch.Tensor, indices: Array) -> Array:
    """The raw words [n] of a live tensor at flat indices, int64 [n], as unsigned integers.

    Of a quantised one zeros, to which what stands beside its codes is added.
    """
    if isinstance(tensor, StandIn):
        return np.zeros(len(indices), f"u{tensor.element_size()}")
    flat = flat_words(name, tensor)
    taken = flat.index_select(0, torch.from_numpy(indices).to(flat.device))
    return taken.cpu().numpy().view(f"u{tensor.element_size()}")


def check_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise CoordinateError when a live tensor is not of the dtype that its words were read in."""
    if tensor.dtype != dtype:
        raise CoordinateError(
            f"tensor {name!r} was {str(dtype).removeprefix('torch.')} when its weights were read "
            f"and is {dtype_name(tensor)} now; its old bits do not fit it any more"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """Words [n] for flat indices, int64 [n], of one live tensor, on its device."""

    name: str
    tensor: torch.Tensor
    dtype: torch.dtype
    indices: torch.Tensor
    words: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of indices and words."""
        return self.indices.nbytes + self.words.nbytes

    def write(self) -> None:
        """Overwrite the live weights. On the CPU by NumPy, whose loop runs beside other threads."""
        if isinstance(self.tensor, StandIn):
            from deltakit.quantized.beside import write_beside  # builds on the training engine

            write_beside(self.name, self.tensor, self.indices, self.words)
            return
        flat = flat_words(self.name, self.tensor)
        if flat.device.type == "cpu":
            flat.numpy()[self.indices.numpy()] = self.words.numpy()
        else:
            flat.scatter_(0, self.indices, self.words)


def make_words(name: str, tensor: torch.Tensor, indices: Array, words: Array) -> Words:
    """NumPy indices [n] and words [n] for a live tensor, brought to its device."""
    at = torch.from_numpy(indices).to(tensor.device)
    return Words(name, tensor, tensor.dtype, at, word_tensor(words, tensor.device))


def write_all(changes: Sequence[Words]) -> None:
    """Write all changes; tensors are shared out among threads where there is enough to do.

    As many threads as torch uses: scattered writes wait for memory most of the time. Raises
    CoordinateError, before anything is written, when a live tensor changed its dtype meanwhile.
    """
    for change in changes:
        check_dtype(change.name, change.tensor, change.dtype)
    sizes = [len(change.indices) for change in changes]
    on_host = sum(n for n, c in zip(sizes, changes, strict=True) if c.tensor.device.type == "cpu")
    workers = min(torch.get_num_threads(), on_host // _WORTH_A_THREAD, len(changes))
    if workers < 2:
        _write(changes)
        return
    bounds = np.searchsorted(np.cumsum(sizes), np.linspace(0, sum(sizes), workers + 1)[1:-1])
    shares = np.split(np.arange(len(changes)), bounds)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(_write, [[changes[n] for n in share] for share in shares]))


def _write(changes: Sequence[Words]) -> None:
    for change in changes:
        change.write()
