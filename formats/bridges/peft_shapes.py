"""Whether the tensors of an adapter fit each other, its configuration and the base."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from deltakit.errors import FormatError
from deltakit.formats.bridges.peft_settings import first_match
from deltakit.formats.checkpoint import Checkpoint

Shape = tuple[int, ...]

_PAIRS = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_embedding_A", "lora_embedding_B"),
    ("lora_A", "lora_B"),  # AdaLoRA's
)
_BESIDE = {"lora_B.bias", "lora_E", "lora_magnitude_vector.weight"}
_MAGNITUDE = "lora_magnitude_vector.weight"


def check_factors(
    config: Mapping[str, Any],
    modules: Mapping[str, Mapping[str, Shape]],
    base: Checkpoint | None,
    *,
    magnitudes: bool,
) -> None:
    """Check low-rank factors: module, as the checkpoint calls it -> parameter -> shape.

    magnitudes: whether they have DoRA's. Raises FormatError for a module without a pair of factors,
    or with other parameters, another rank than configured, or another size than the base's weight.
    """
    for module, shapes in modules.items():
        pair = next((p for p in _PAIRS if set(p) <= set(shapes)), None)
        known = {*(pair or ()), *_BESIDE} - (set() if magnitudes else {_MAGNITUDE})
        if pair is None or not set(shapes) <= known or magnitudes > (_MAGNITUDE in shapes):
            wanted = "factors and magnitudes" if magnitudes else "a pair of factors"
            raise FormatError(f"module {module!r} has {', '.join(shapes)}, expected {wanted}")
        a, b = (shapes[parameter] for parameter in pair)
        if len(a) < 2 or len(b) < 2 or b[1] != a[0] or math.prod(b[2:]) != 1:
            raise FormatError(f"module {module!r}: factors {list(a)} and {list(b)} do not fit")
        rank = first_match(config.get("rank_pattern") or {}, module, "rank_pattern")
        expected = config.get("r", config.get("init_r")) if rank is None else rank
        if a[0] != expected:
            raise FormatError(
                f"module {module!r}: its factors have rank {a[0]}, the adapter's configuration says "
                f"{expected}"
            )
        if base is not None:
            straight, turned = (b[0], *a[1:]), (a[1], b[0])
            possible = (turned,) if pair == _PAIRS[1] else (straight, turned)
            _check_weight(module, possible, base)


def check_gains(modules: Mapping[str, Mapping[str, Shape]], base: Checkpoint | None) -> None:
    """Check the factors of IA3: one for each input, [1, in, ...], or each output, [out, 1, ...]."""
    for module, shapes in modules.items():
        shape = shapes.get("ia3_l")
        if shape is None or len(shapes) != 1 or len(shape) < 2 or math.prod(shape) != max(shape):
            raise FormatError(
                f"module {module!r} has {', '.join(f'{n} {list(s)}' for n, s in shapes.items())}; "
                "expected a vector of factors"
            )
        if base is not None:
            weight = base.info(f"{module}.weight").shape
            if max(shape) not in weight[:2]:
                raise _other_base(module, f"{max(shape)} factors", weight)


def is_turned(
    modules: Mapping[str, Mapping[str, Shape]], base: Checkpoint | None, configured: bool
) -> bool:
    """Whether the layers' weights lie as [in, out] (transformers' Conv1D).

    The base's shapes tell it where they are not square and agree; otherwise it is as configured.
    """
    told = set()
    for module, shapes in {} if base is None else modules.items():
        pair = next((p for p in (_PAIRS[0], _PAIRS[2]) if set(p) <= set(shapes)), None)
        weight = base.info(f"{module}.weight").shape if base is not None else ()
        if pair is not None and len(weight) == 2:
            straight = (shapes[pair[1]][0], shapes[pair[0]][1])
            told |= {weight != straight} if straight[0] != straight[1] else set()
    return told.pop() if len(told) == 1 else configured


def _check_weight(module: str, possible: Collection[Shape], base: Checkpoint) -> None:
    info = base.info(f"{module}.weight")
    if info.shape not in possible or not info.kind.is_floating:
        raise _other_base(module, f"factors for {list(next(iter(possible)))}", info.shape)


def _other_base(module: str, what: str, shape: Shape) -> FormatError:
    return FormatError(
        f"module {module!r} has {what}, the base's weight is {list(shape)}; is this the base that "
        "the adapter was made of?"
    )
