"""How a base is quantised: the settings, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltakit.errors import ConfigError

KINDS = ("nf4", "fp4", "int8")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """A way of holding linear weights in 4 or 8 bits.

    kind: "nf4" (QLoRA, Dettmers et al. 2023), "fp4", or "int8" (LLM.int8(), Dettmers et al. 2022).
    double: quantise the 4-bit kinds' block scales too, which saves 0.37 bits per weight (QLoRA,
    section 3). compute_dtype: what 4-bit layers multiply in; None takes the dtype that the weights
    were loaded in. Raises ConfigError for what does not go together.
    """

    kind: str
    double: bool = False
    compute_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"unknown quantisation {self.kind!r}; known: {', '.join(KINDS)}")
        if self.compute_dtype not in (None, *COMPUTE_DTYPES):
            raise ConfigError(
                f"unknown compute dtype {self.compute_dtype!r}; known: {', '.join(COMPUTE_DTYPES)}"
            )
        if self.kind == "int8" and (self.double or self.compute_dtype):
            raise ConfigError(
                "double quantisation and compute dtypes are for nf4 and fp4; int8 has neither"
            )

    @classmethod
    def of(
        cls, kind: str | None, *, double: bool | None, compute_dtype: str | None
    ) -> Quantization | None:
        """What settings say; None without a kind. Raises ConfigError for options of nothing."""
        if kind is not None:
            return cls(kind=kind, double=bool(double), compute_dtype=compute_dtype)
        if double is not None or compute_dtype is not None:
            name = "compute_dtype" if double is None else "double_quantization"
            raise ConfigError(f"setting {name} needs a quantised base; give --quantize")
        return None

    def as_dict(self) -> Mapping[str, Any]:
        """What a delta and a run record."""
        if self.kind == "int8":
            return {"kind": self.kind}
        double, dtype = self.double, self.compute_dtype
        return {"kind": self.kind, "double_quantization": double, "compute_dtype": dtype}
