"""Presets: named sets of settings that work, one plain dict each.

A preset stands below the configuration file and the flags, so anything may be overruled; its name
is recorded in the run. `<method>-default` is what `deltakit train --method <method>` uses.
"""

from __future__ import annotations

from typing import Any

EMBEDDINGS = ["*embed*", "*wte*", "*wpe*"]

PRESETS: dict[str, dict[str, Any]] = {
    "id3-default": {
        "method": "id3",
        "allocation": "proportional",
        "precondition": "factored",
        "schedule": "uniform",
        "unmask_fraction": 0.1,
        "eps": 1.0,
        "exp": 0.0,
        "age": "entry",
        "lr": 2e-2,
        "exclude": EMBEDDINGS,
    },
    "id3-paper": {
        "method": "id3",
        "allocation": "global",
        "precondition": "none",
        "schedule": "uniform",
        "unmask_fraction": 1.0,
        "eps": 1.0,
        "exp": 0.0,
        "age": "shared",
        "lr": 1e-3,
        "exclude": [],
    },
    "random-default": {
        "method": "random",
        "age": "entry",
        "lr": 2e-2,
        "exclude": EMBEDDINGS,
    },
}
