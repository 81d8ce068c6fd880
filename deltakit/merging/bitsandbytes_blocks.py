"""The blocks of tensors that bitsandbytes has quantised: codes, scales, and what they stand for.

A block has one scale: in 4-bit tensors `blocksize` weights in flat order (Dettmers et al., QLoRA,
2023), in int8 tensors a row (Dettmers et al., LLM.int8(), 2022). Blocks do not depend on one
another, except that double quantisation stores the scales themselves as 8-bit codes, in blocks of
256 around a common offset. All values are computed by bitsandbytes' own functions, on the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from bitsandbytes import functional

from deltakit.dtypes import DTYPES, Array, DType
from deltakit.errors import DeltaError, FormatError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.merging.quantized import Quantized


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantised tensor: codes, bytes [blocks, bytes per block]; scales, float32 [blocks].

    nested: of doubly quantised scales, their codes uint8 [blocks] and the scales of these, float32
    [ceil(blocks / 256)]; otherwise None.
    """

    codes: Array
    scales: Array
    nested: tuple[Array, Array] | None = None


class Blocks(Protocol):
    """A quantised tensor of a checkpoint, as blocks of `size` weights that read as `kind`.

    shape: of the tensor that was quantised. written: the names of the stored tensors that follow
    from the codes; all others stay as they are.
    """

    shape: tuple[int, ...]
    size: int
    kind: DType
    written: tuple[str, ...]

    def read(self) -> Codes:
        """The whole tensor as stored."""

    def dequantize(self, codes: Array, scales: Array) -> Array:
        """The weights of blocks, words [blocks, size] of `kind`."""

    def quantize(self, words: Array) -> tuple[Array, Array]:
        """Codes and scales of blocks; DeltaError for weights that are not finite."""

    def settled(self, old: Codes, new: Codes) -> Codes:
        """`new` with scales as they can be stored."""

    def stored(self, codes: Codes) -> dict[str, Array]:
        """The arrays of the tensors in `written`, by name."""


def blocks_of(base: Checkpoint, quantized: Quantized) -> Blocks:
    """The blocks of a tensor that bitsandbytes has quantised.

    Raises FormatError for statistics that are missing or do not fit.
    """
    if quantized.scheme == "int8":
        return RowBlocks(base, quantized)
    return FourBitBlocks(base, quantized)


class RowBlocks:
    """An int8 tensor [rows, columns] with a scale per row."""

    kind = DTYPES["float32"]

    def __init__(self, base: Checkpoint, quantized: Quantized) -> None:
        self._base, self._name = base, quantized.info.name
        self.shape = quantized.info.shape
        (self._scales,) = quantized.statistics
        self.written: tuple[str, ...] = (self._name, self._scales)
        layout = self._name.removesuffix("weight") + "weight_format"
        rowwise = layout not in base.tensors or not base.read(layout).any()
        found = base.info(self._scales)
        if (
            len(self.shape) != 2
            or not rowwise
            or (found.dtype, found.numel)
            != (
                "float32",
                self.shape[0],
            )
        ):
            raise _unreadable(quantized, f"int8 of shape {list(self.shape)} by rows")
        self.size = self.shape[1]

    def read(self) -> Codes:
        codes = self._base.read(self._name).view(np.int8).reshape(self.shape)
        return Codes(codes, self._base.read(self._scales).view(np.float32))

    def dequantize(self, codes: Array, scales: Array) -> Array:
        made = functional.int8_vectorwise_dequant(torch.from_numpy(codes), torch.from_numpy(scales))
        return _words(made, self.kind)

    def quantize(self, words: Array) -> tuple[Array, Array]:
        values = _checked(_tensor(words, self.kind).half(), self._name)  # as Int8Params does
        codes, scales, _ = functional.int8_vectorwise_quant(values)
        return codes.numpy(), scales.numpy()

    def settled(self, old: Codes, new: Codes) -> Codes:
        return new

    def stored(self, codes: Codes) -> dict[str, Array]:
        return {self._name: codes.codes, self._scales: codes.scales}


class FourBitBlocks:
    """An nf4 or fp4 tensor of any shape, two codes to a byte in flat order."""

    def __init__(self, base: Checkpoint, quantized: Quantized) -> None:
        self._base, self._name, self._scheme = base, quantized.info.name, quantized.scheme
        state = _state(base, quantized)
        try:
            self.shape = tuple(int(n) for n in state["shape"])
            self.size, self.kind = int(state["blocksize"]), DTYPES[state["dtype"]]
            self._nested = int(state["nested_blocksize"]) if "nested_blocksize" in state else 0
            self._offset = np.float32(state["nested_offset"]) if self._nested else None
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(quantized, "its shape, blocksize and dtype") from error
        self._bytes = quantized.info.nbytes
        count = -(-prod(self.shape) // self.size)
        expected = {".absmax": ("uint8" if self._nested else "float32", count)}
        if self._nested:
            expected[".nested_absmax"] = ("float32", -(-count // self._nested))
            expected[".nested_quant_map"] = ("float32", 256)
        for suffix, described in expected.items():
            info = base.tensors.get(self._name + suffix)
            if info is None or (info.dtype, info.numel) != described:
                raise _unreadable(quantized, f"{suffix} of {described[1]} {described[0]}")
        if self._bytes != -(-prod(self.shape) // 2):
            raise _unreadable(quantized, f"{-(-prod(self.shape) // 2)} bytes of codes")
        self.written: tuple[str, ...] = (self._name, f"{self._name}.absmax")
        if self._nested:
            self.written += (f"{self._name}.nested_absmax",)

    def read(self) -> Codes:
        packed = self._base.read(self._name).view(np.uint8)
        scales = self._read("absmax", np.uint8 if self._nested else np.float32)
        codes: Array = np.zeros((len(scales), self.size // 2), np.uint8)
        codes.reshape(-1)[: packed.size] = packed
        if not self._nested:
            return Codes(codes, scales)
        nested = (scales, self._read("nested_absmax", np.float32))
        return Codes(codes, self._scales(*nested), nested)

    def dequantize(self, codes: Array, scales: Array) -> Array:
        state = functional.QuantState(  # type: ignore[no-untyped-call]
            absmax=torch.from_numpy(scales),
            shape=torch.Size((len(codes), self.size)),
            blocksize=self.size,
            quant_type=self._scheme,
            dtype=getattr(torch, self.kind.name),
        )
        made = functional.dequantize_4bit(torch.from_numpy(codes).reshape(-1, 1), state)
        return _words(made, self.kind)

    def quantize(self, words: Array) -> tuple[Array, Array]:
        values = _checked(_tensor(words, self.kind), self._name)
        codes, state = functional.quantize_4bit(
            values, blocksize=self.size, quant_type=self._scheme
        )
        return codes.numpy().reshape(len(words), -1), state.absmax.numpy()

    def settled(self, old: Codes, new: Codes) -> Codes:
        """Doubly quantised scales: blocks of them in which none differs keep their codes, and all
        keep the offset, so that nothing moves that has no entry near."""
        if old.nested is None:
            return new
        codes, state = functional.quantize_blockwise(
            torch.from_numpy(new.scales - self._offset), code=self._map(), blocksize=self._nested
        )
        differ = np.unique(np.flatnonzero(new.scales != old.scales) // self._nested)
        fresh = np.isin(np.arange(len(new.scales)) // self._nested, differ)
        inner = np.isin(np.arange(len(old.nested[1])), differ)
        nested = (
            np.where(fresh, codes.numpy(), old.nested[0]),
            np.where(inner, state.absmax.numpy(), old.nested[1]),
        )
        return replace(new, scales=self._scales(*nested), nested=nested)

    def stored(self, codes: Codes) -> dict[str, Array]:
        scales = {".absmax": codes.scales}
        if codes.nested is not None:
            scales = {".absmax": codes.nested[0], ".nested_absmax": codes.nested[1]}
        found = {self._name + suffix: array for suffix, array in scales.items()}
        return {self._name: codes.codes.reshape(-1)[: self._bytes], **found}

    def _scales(self, codes: Array, scales: Array) -> Array:
        made = functional.dequantize_blockwise(
            torch.from_numpy(codes),
            absmax=torch.from_numpy(scales),
            code=self._map(),
            blocksize=self._nested,
        )
        return np.asarray(made.numpy() + self._offset)

    def _map(self) -> torch.Tensor:
        return torch.from_numpy(self._read("nested_quant_map", np.float32))

    def _read(self, suffix: str, kind: Any) -> Array:
        return self._base.read(f"{self._name}.{suffix}").view(kind)


def _state(base: Checkpoint, quantized: Quantized) -> Mapping[str, Any]:
    """What bitsandbytes has packed as JSON into the bytes of a tensor."""
    try:
        content = json.loads(base.read(quantized.statistics[0]).tobytes())
    except ValueError as error:
        raise _unreadable(quantized, "JSON") from error
    if not isinstance(content, dict) or content.get("quant_type") != quantized.scheme:
        raise _unreadable(quantized, f"quant_type {quantized.scheme}")
    return content


def _unreadable(quantized: Quantized, expected: str) -> FormatError:
    return FormatError(
        f"{quantized.info.file}: the statistics of tensor {quantized.info.name!r} "
        f"({quantized.how}) do not fit; expected {expected}"
    )


def _checked(values: torch.Tensor, name: str) -> torch.Tensor:
    if not bool(torch.isfinite(values).all()):
        raise DeltaError(
            f"tensor {name!r}: a merged value is not finite or too large for {values.dtype}, and "
            "would spoil its whole block when it is quantised"
        )
    return values


def _tensor(words: Array, kind: DType) -> torch.Tensor:
    bytes_ = np.ascontiguousarray(words).view(np.uint8)
    return torch.from_numpy(bytes_).view(getattr(torch, kind.name))


def _words(values: torch.Tensor, kind: DType) -> Array:
    return values.contiguous().view(torch.uint8).numpy().view(kind.words)
