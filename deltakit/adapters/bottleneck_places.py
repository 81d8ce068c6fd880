"""Where bottleneck adapters stand in a transformer, told by the roles of its linear layers.

An adapter stands at the very output of a projection, before whatever the model does with that
output: dropout, a norm inside the branch, the residual addition. So it makes no difference whether a
model adds the residual in a module (BERT, DeBERTa, T5), in its block (GPT-2, Llama, ViT, DistilBERT)
or between functions (OPT). The sources put it after dropout; without dropout that is the same.
"""

from __future__ import annotations

from typing import Any

import torch

from deltakit.errors import ConfigError
from deltakit.live.plain_names import plain_names
from deltakit.targets.roles import Role, is_a, roles


def bottleneck_places(model: torch.nn.Module, kind: str) -> dict[str, str]:
    """Live name of a projection that an adapter can stand at -> that of the layer it reads.

    houlsby: the outputs of attention (cross-attention too) and of the feed-forward. pfeiffer: the
    latter alone. Both read what they stand at. parallel: the outputs of the feed-forward, reading
    the input of its first layer. In the model's order. Raises ConfigError for a model in which these
    are not recognised.
    """
    forward = _feed_forwards(model, kind)
    if kind == "parallel":
        return forward
    outputs = {*forward, *(_attention_outputs(model, kind) if kind == "houlsby" else ())}
    return {name: name for name, _ in model.named_modules() if name in outputs}


def _feed_forwards(model: torch.nn.Module, kind: str) -> dict[str, str]:
    """Last layer of each feed-forward -> its first one."""
    blocks: dict[str, list[str]] = {}
    for name, role in _plain_roles(model).items():
        if role.kind == "mlp":
            layer = name.rpartition(".")[0]
            blocks.setdefault(_block(layer), []).append(layer)
    if not blocks:
        raise _unknown(model, kind, "it has no numbered blocks with linear layers")
    for block, layers in blocks.items():
        if not _is_feed_forward(model, layers):
            raise _unknown(model, kind, f"{block!r} has no plain or gated feed-forward")
    return {layers[-1]: layers[0] for layers in blocks.values()}


def _is_feed_forward(model: torch.nn.Module, layers: list[str]) -> bool:
    """Whether all layers but the last read what the last one writes, and write what it reads.

    A gated one has two that do, or one of twice the width.
    """
    if any("expert" in layer for layer in layers):
        return False
    *first, (inner, outer) = [widths(model.get_submodule(layer)) for layer in layers]
    return bool(first) and all(i == outer and o in (inner, 2 * inner) for i, o in first)


def _attention_outputs(model: torch.nn.Module, kind: str) -> list[str]:
    found = _plain_roles(model)
    weights = {role.layer: n.rpartition(".")[0] for n, role in found.items() if role.kind == "o"}
    for layer in dict.fromkeys(r.layer for r in found.values() if r.kind in ("q", "qkv")):
        if layer not in weights or is_a(model.get_submodule(layer), "MultiheadAttention"):
            raise _unknown(model, kind, f"{layer!r} has no output layer that it calls")
    if not weights:
        raise _unknown(model, kind, "it has no attention layers")
    return list(weights.values())


def _plain_roles(model: torch.nn.Module) -> dict[str, Role]:
    """Roles without those of the adapters that stand in the model already."""
    plain = plain_names(model)
    return {name: role for name, role in roles(model).items() if plain(name) == name}


def _block(layer: str) -> str:
    """The innermost numbered module around a layer."""
    parts = layer.split(".")
    last = max(n for n, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: last + 1])


def widths(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, (0, 0) of anything else."""
    if is_a(layer, "Conv1D"):
        return int(layer.nx), int(layer.nf)
    return int(getattr(layer, "in_features", 0)), int(getattr(layer, "out_features", 0))


def _unknown(model: torch.nn.Module, kind: str, why: str) -> ConfigError:
    return ConfigError(
        f"adapter {kind!r} has no known place in {type(model).__name__}: {why}; use an adapter of "
        "single layers, such as lora"
    )
