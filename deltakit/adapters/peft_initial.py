"""Rules that give an adapter of peft initial values of the size that peft gives them.

Where peft's source fixes the distribution, the rule does too. Any other parameter is looked at as
peft itself initialised it, under a fixed seed: all elements alike, or of a spread, which a uniform
distribution of the same standard deviation then has.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch

from deltakit.adapter import FAN_IN
from deltakit.adapters.building import Injection
from deltakit.adapters.computed import PAIRS, ROW_NORM

# kaiming_uniform_(a=sqrt(5)) is uniform within 1 / sqrt(fan in): He et al., 2015, equation 10.
_FAN_IN = ("lora_A.weight", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hira_A", "delora_A", "lokr_w2")
_KNOWN: dict[str, dict[str, Any]] = {
    **{name: {"uniform": FAN_IN} for name in _FAN_IN},
    "lora_A": {"uniform": 0.0346},  # AdaLoRA: a standard deviation of 0.02
    "lora_B": {"uniform": 0.0346},
    "fourierft_spectrum": {"uniform": 1.73},  # a standard deviation of 1
    "lora_magnitude_vector.weight": {"computed": ROW_NORM},
    "hra_u": {"computed": PAIRS},
}


def initial_rules(
    kind: str, config: Mapping[str, Any], injection: Injection
) -> dict[str, dict[str, Any]]:
    """See `building.Builder`."""
    tensors: dict[str, list[torch.Tensor]] = {}
    for parameters in injection.parameters.values():
        for name, parameter in parameters.items():
            tensors.setdefault(name, []).append(parameter.detach().reshape(-1))
    return {name: _KNOWN.get(name) or _measured(torch.cat(t)) for name, t in tensors.items()}


def _measured(values: torch.Tensor) -> dict[str, Any]:
    if (values == values[0]).all():
        return {"constant": float(values[0])}
    std = float(values.double().square().mean().sqrt())
    return {"uniform": float(f"{sqrt(3) * std:.3g}")}
