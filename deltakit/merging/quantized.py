"""Quantised tensors of a checkpoint: which they are, and which deltas cannot simply be merged.

Their elements are codes that get their values from statistics in tensors beside them. A delta of
the full-precision model has no coordinates there, and rounding to codes again loses what is small
against a step of the code: of changes of 1e-3 to weights of about 0.02, both normal, 4 % leave a
trace in nf4, 12 % in fp4 and 77 % in int8 (bitsandbytes 0.50, 0.5 % of 4 M weights).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.dtypes import dtype_of
from deltakit.errors import BaseMismatchError, ConfigError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.safetensors_file import TensorInfo
from deltakit.merging.inputs import Input

_STATE = ".quant_state.bitsandbytes__"
_STATISTICS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
# What the scale of "layer.weight" is called: by transformers and DeepSeek, by compressed-tensors,
# ModelOpt and fbgemm, and by ComfyUI ("layer.scale_weight").
_SCALES = ("{name}_scale_inv", "{name}_scale", "{name}.scale", "{stem}scale", "{stem}scale_weight")


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantised tensor of a checkpoint.

    scheme: "nf4", "fp4" or "int8", as bitsandbytes stores them, or "scaled": 8-bit elements in
    units of a scale. statistics: the names of the tensors beside it that tell its values.
    """

    info: TensorInfo
    scheme: str
    statistics: tuple[str, ...]

    @property
    def how(self) -> str:
        """The scheme in words."""
        if self.scheme == "scaled":
            return f"{self.info.dtype} in units of {self.statistics[0]!r}"
        return f"bitsandbytes {self.scheme}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Survival:
    """What quantising again left of a merge.

    tensors: that were quantised again. entries: of the merge in them (the union of the supports).
    survived: entries whose dequantised value, as bitsandbytes computes it in the dtype that it
    quantised from (float32 for int8), differs from the one before; by how much is not asked.
    moved: weights without an entry whose value differs all the same, since they share a block (a
    row for int8, or a block of scales) with entries.
    """

    tensors: int
    entries: int
    survived: int
    moved: int

    def note(self) -> str:
        """One line for the user."""
        return (
            f"{self.survived:,} of {self.entries:,} entries in {self.tensors:,} quantised tensors "
            f"survive quantising again; {self.moved:,} other weights move with them"
        )


def quantization(base: Checkpoint, name: str) -> Quantized | None:
    """How a tensor of `base` is quantised; None for a plain one and for one that is not there."""
    info = base.tensors.get(name)
    if info is None:
        return None
    for scheme in ("nf4", "fp4"):
        if name + _STATE + scheme in base.tensors:
            names = [name + each for each in (_STATE + scheme, *_STATISTICS)]
            return Quantized(info, scheme, tuple(each for each in names if each in base.tensors))
    stem = name.removesuffix("weight")
    if info.dtype == "int8" and stem != name and f"{stem}SCB" in base.tensors:
        return Quantized(info, "int8", (f"{stem}SCB",))
    if info.dtype == "int8" or info.dtype.lower().startswith(("float8", "f8_")):
        scales = [scale.format(name=name, stem=stem) for scale in _SCALES]
        found = tuple(each for each in scales if each in base.tensors and each != name)
        return Quantized(info, "scaled", found) if found else None
    return None


def quantized_in(
    inputs: Sequence[Input], base: Checkpoint, *, requantize: bool
) -> dict[str, Quantized]:
    """The tensors that must be quantised again for these deltas to be merged into `base`, by name.

    `set` tensors of the stored dtype and shape are not among them: they hold the codes themselves,
    as the difference of two quantised checkpoints does. Raises BaseMismatchError for the first of
    the others unless `requantize`, which only bitsandbytes' schemes allow, and for a whole extra
    that would take the place of codes.
    """
    found: dict[str, Quantized] = {}
    for each in inputs:
        _refuse_adapter(each, base)
        for name, tensor in each.delta.tensors.items():
            quantized = quantization(base, name)
            if quantized is None or _holds_codes(tensor, each.weight, quantized.info):
                continue
            if not requantize or quantized.scheme == "scaled":
                raise BaseMismatchError(f"{each.label}: {_refusal(quantized, each.delta)}")
            found[name] = quantized
        for name, array in each.delta.extras.items():
            quantized = quantization(base, name)
            if quantized is not None and quantized.info.dtype != dtype_of(array).name:
                raise BaseMismatchError(
                    f"{each.label}: extra {name!r} is {dtype_of(array).name}, in "
                    f"{quantized.info.file} it is quantised ({quantized.how}); "
                    f"merge into the full-precision base{_named(each.delta)}"
                )
    return found


def refuse_conversion(base: Checkpoint, dtype: str | None) -> None:
    """Raise ConfigError where converting all floating tensors would convert statistics too."""
    if dtype is None:
        return
    for name in base.tensors:
        quantized = quantization(base, name)
        if quantized is not None:
            raise ConfigError(
                f"dtype {dtype!r} would convert what tensor {name!r} is quantised by in "
                f"{quantized.info.file} ({quantized.how}) as well; merge without dtype (--dtype)"
            )


def plain_part(delta: SparseDelta, quantized: Mapping[str, Quantized]) -> SparseDelta:
    """The delta without the tensors that are quantised again."""
    if not any(name in quantized for name in delta.tensors):
        return delta
    return SparseDelta(
        tensors={name: t for name, t in delta.tensors.items() if name not in quantized},
        extras=delta.extras,
        base=delta.base,
    )


def _refuse_adapter(given: Input, base: Checkpoint) -> None:
    adapter = given.delta.adapter
    if adapter is None:
        return
    for name in given.delta.tensors:
        quantized = quantization(base, f"{adapter.split(name)[0]}.weight")
        if quantized is not None:
            raise BaseMismatchError(
                f"{given.label}: the adapter stands at tensor {quantized.info.name!r}, which is "
                f"quantised in {quantized.info.file} ({quantized.how}); merge into the "
                f"full-precision base{_named(given.delta)}"
            )


def _holds_codes(tensor: TensorDelta, weight: float, info: TensorInfo) -> bool:
    same = (tensor.mode, tensor.dtype, tensor.shape) == ("set", info.dtype, info.shape)
    # 4-bit codes may be stored in a floating dtype, where weights would be applied to nonsense.
    return same and (weight == 1 or not info.kind.is_floating)


def _refusal(quantized: Quantized, delta: SparseDelta) -> str:
    what = f"tensor {quantized.info.name!r} is quantised in {quantized.info.file} ({quantized.how})"
    base = f"merge into the full-precision base{_named(delta)}"
    if quantized.scheme == "scaled":
        return f"{what}, so entries would have to be in units of the scale, too; {base}"
    return (
        f"{what}, and rounding it again loses most of a small delta; {base}, or into a new file "
        "with --requantize (requantize=True), which counts the entries that survive"
    )


def _named(delta: SparseDelta) -> str:
    known = None if delta.base is None else delta.base.model_id
    return "" if known is None else f", {known}"
