"""Presets: named sets of settings that work, one plain dict each.

A preset stands below the configuration file and the flags, so anything may be overruled; its name
is recorded in the run. `<method>-default` is what `deltakit train --method <method>` uses, with an adapter `<method>-adapter`.
"""

from __future__ import annotations

from typing import Any

EMBEDDINGS = ["*embed*", "*wte*", "*wpe*"]
PAPER = {"age": "shared", "lr": 1e-3, "exclude": []}  # the authors' Adam counts steps per tensor


def _default(lr: float, **settings: Any) -> dict[str, Any]:
    """Settings of `<method>-default`: embeddings waste budget, and new entries start new moments.

    lr: for densities about 0.4 %; sparser supports take more.
    """
    return {"age": "entry", "lr": lr, "exclude": EMBEDDINGS, **settings}


SPREAD = {"allocation": "proportional"}  # global selection crowds into a few tensors
EARLY = {**SPREAD, "precondition": "factored", "unmask_fraction": 0.1}  # late entries learn little
CROWDED = 1e-3  # entries chosen by raw gradients share columns, move together, and diverge above

DEFAULTS: dict[str, dict[str, Any]] = {  # method -> settings
    "id3": _default(2e-2, **EARLY, schedule="uniform", eps=1.0, exp=0.0),
    "random": _default(2e-2),
    "bernoulli": _default(2e-2),
    "columns": _default(1e-2, target=["all-linear"]),
    "rows": _default(1e-2, target=["all-linear"]),
    "blocks": _default(1e-2, target=["all-linear"]),
    "heads": _default(1e-2, target=["attention"]),
    "n:m": _default(1e-2),
    "mask": _default(1e-2),
    "static": _default(1e-2, **SPREAD, precondition="factored"),
    "increment": _default(2e-2, **EARLY),
    "repeat": _default(1e-3, **SPREAD, precondition="factored"),
    "drop-and-grow": _default(1e-2),
    "pafi": _default(1e-2),
    "super-tuning": _default(1e-2),
    "sift": _default(CROWDED),
    "sam": _default(CROWDED, **SPREAD),
    "snip": _default(CROWDED, **SPREAD),
    "grasp": _default(CROWDED, **SPREAD),
    "fish": _default(CROWDED, **SPREAD),
    "child-tuning-d": _default(CROWDED, **SPREAD),
    "child-tuning-f": _default(1e-3, **SPREAD),  # its entries start trained
    "diff-pruning": _default(1e-3, **SPREAD),  # its entries start trained
    "lt-sft": _default(1e-2, **SPREAD),
    "threshold-mask": _default(1e-3, **SPREAD),  # its entries stay zero; the rate moves nothing
    "bitfit": _default(1e-3),
    "s-bitfit": _default(1e-3),
    "u-bitfit": _default(1e-3),
}

# Methods that choose single weights, wherever they stand.
ADAPTERS = (
    *("id3", "random", "bernoulli", "mask", "static", "increment", "repeat", "drop-and-grow"),
    *("pafi", "super-tuning", "sift", "sam", "snip", "grasp", "fish", "lt-sft"),
)

# Adapters start from noise and zeros, not from trained weights: their entries crowd less and move
# further, so the rates are those of adapters, and no tensor of theirs is left out.
ADAPTER_LR = 2e-3

_ID3 = {
    "method": "id3",
    "allocation": "global",
    "precondition": "none",
    "schedule": "uniform",
    "unmask_fraction": 1.0,
    **PAPER,
}

PRESETS: dict[str, dict[str, Any]] = {
    **{f"{method}-default": {"method": method, **more} for method, more in DEFAULTS.items()},
    **{
        f"{method}-adapter": {"method": method, **more, "exclude": [], "lr": ADAPTER_LR}
        for method, more in DEFAULTS.items()
        if method in ADAPTERS
    },
    # He et al. 2022 (SparseAdapter): connection sensitivity at the start, the rest zero.
    "sparse-adapter": {
        "method": "snip",
        "num_batches": 1,
        "masked": "zero",
        "allocation": "global",
        "age": "entry",
        "lr": ADAPTER_LR,
        "exclude": [],
    },
    # Agarwal et al. 2024, algorithm 1, with D3 reduced to the gradient.
    "id3-paper": {**_ID3, "eps": 1.0, "exp": 0.0},
    # Agarwal et al. 2024, language understanding; the rate is not the paper's.
    "id3-paper-nlu": {**_ID3, "eps": 1.0, "exp": 2.0},
    # Agarwal et al. 2024, figure 4: the best pair of exp and eps; the rate is not the paper's.
    "id3-paper-best": {**_ID3, "eps": 0.5, "exp": -1.0},
    # Assumed for generation: exp, eps and rate of the example in the authors' toolkit, version 0.2.
    "id3-paper-generation": {**_ID3, "eps": 1e-3, "exp": 0.0, "lr": 1e-4},
    # Xu and Zhang 2024: queries and values alone, a constant rate of 1e-2 at a density of 0.01 %.
    "random-paper": {
        "method": "random",
        "target": ["attention-qv"],
        "scheduler": "constant",
        "warmup": 0.0,
        **PAPER,
        "lr": 1e-2,
    },
}
