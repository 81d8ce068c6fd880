"""The part of a network that a tensor belongs to, told by its name in the checkpoint alone.

`roles` tells it of a live model, by the types of its modules; this tells it of files, where there
is no model. A test compares them on models of many architectures.
"""

from __future__ import annotations

import re

PARTS = ("attention", "feed-forward", "embeddings", "norms", "biases", "other")
_NORM = re.compile(r"norm|^(ln|bn)(_|\d|$)", re.IGNORECASE)
_BIAS = re.compile(r"(^|_)bias(_|$)")
_EMBEDDING = re.compile(r"embed(?!_out)|^(wte|wpe|shared|relative_attention_bias)$", re.IGNORECASE)
_ATTENTION = re.compile(r"att", re.IGNORECASE)
_CONVOLUTION = re.compile(r"conv", re.IGNORECASE)


def part_of(name: str, axes: int) -> str:
    """One of `PARTS` for a tensor of so many axes.

    Weights of the numbered blocks outside attention are their feed-forward part; what belongs to no
    block (heads, poolers) and convolutions are "other".
    """
    *owners, leaf = name.split(".")
    owner = owners[-1] if owners else ""
    if _NORM.search(owner):
        return "norms"
    is_bias = _BIAS.search(leaf) is not None
    if not is_bias and any(_EMBEDDING.search(part) for part in owners):
        return "embeddings"
    if is_bias:
        return "biases"
    if axes not in (2, 3) or _CONVOLUTION.search(owner):
        return "other"
    if any(_ATTENTION.search(part) for part in owners):
        return "attention"
    return "feed-forward" if any(part.isdigit() for part in owners) else "other"
