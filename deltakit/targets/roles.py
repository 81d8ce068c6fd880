"""What each parameter of a model is for: query, value, feed-forward, bias, norm, embedding, ...

Told by the type of the module that owns it and by its name, so that one answer holds for all
architectures. Types are told by the names of their classes: this needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ATTENTION = ("q", "k", "v", "o")
_PROJECTIONS = {
    "q": ("q", "q_proj", "query", "query_proj", "q_lin", "q_attn"),
    "k": ("k", "k_proj", "key", "key_proj", "k_lin"),
    "v": ("v", "v_proj", "value", "value_proj", "v_lin"),
    "o": ("o", "o_proj", "out_proj", "out_lin", "c_proj", "dense"),
}
_FUSED = ("c_attn", "qkv_proj", "in_proj", "qkv", "query_key_value", "Wqkv", "W_pack")
_ROLES = {name: role for role, names in _PROJECTIONS.items() for name in names}
_NORM = re.compile(r"norm|^(ln|bn)(_|\d|$)", re.IGNORECASE)
_BIAS = re.compile(r"(^|_)bias(_|$)")  # bias, q_bias, in_proj_bias, bias_ih_l0

Spans = list[tuple[int, int]]  # [start, stop) along the output features


@dataclass(frozen=True)
class Role:
    """What one parameter is for.

    kind: "q", "k", "v", "o", "qkv" (fused), "mlp", "linear" (any other linear weight), "head" (of
    a task), "bias", "norm", "embedding" or "other". output_axis: the axis of output features.
    layer: of attention weights, the name of the attention layer. head_dim: of attention weights,
    width of one head, or None where the model does not say. spans: of fused weights, where the
    output features of "q", "k" and "v" lie, head by head; empty where the order is not known.
    """

    kind: str
    output_axis: int = 0
    layer: str = ""
    head_dim: int | None = None
    spans: Mapping[str, Spans] = field(default_factory=dict)

    @property
    def linear(self) -> bool:
        """Whether this is the weight of a linear layer that is no task's head."""
        return self.kind in (*ATTENTION, "qkv", "mlp", "linear")


def roles(model: torch.nn.Module) -> dict[str, Role]:
    """Live name -> role of every parameter, in the model's order."""
    modules = dict(model.named_modules())
    outputs: Any = getattr(model, "get_output_embeddings", lambda: None)()
    prefix = str(getattr(model, "base_model_prefix", ""))
    inner = f"{prefix}." if prefix and prefix in modules else ""
    found = {}
    for name, parameter in model.named_parameters():
        role = _role(name, parameter, modules)
        tied_head = outputs is not None and parameter is getattr(outputs, "weight", None)
        if role.linear and (tied_head or not name.startswith(inner)):
            role = Role("head", role.output_axis)
        found[name] = role
    return found


def is_a(module: Any, *names: str) -> bool:
    """Whether the module's class, or one it derives from, has one of these names."""
    return any(kind.__name__ in names for kind in type(module).__mro__)


def is_bias(name: str, ndim: int, model: torch.nn.Module | None) -> bool:
    """Whether a tensor of this live name is the bias vector of a layer that is no normalisation.

    Without a model the owner's type is not known, and its name alone tells normalisations.
    """
    path, _, leaf = name.rpartition(".")
    owner = "" if model is None else type(model.get_submodule(path)).__name__
    normalises = _NORM.search(path.rpartition(".")[2]) or _NORM.search(owner)
    return ndim == 1 and bool(_BIAS.search(leaf)) and not normalises


def _role(name: str, parameter: torch.nn.Parameter, modules: Mapping[str, Any]) -> Role:
    path, _, leaf = name.rpartition(".")
    owner = modules[path]
    called = path.rpartition(".")[2]
    if _NORM.search(type(owner).__name__) or (parameter.ndim == 1 and _NORM.search(called)):
        return Role("norm")
    if is_a(owner, "Embedding", "EmbeddingBag") or (_embeds(path, modules) and leaf != "bias"):
        return Role("embedding")
    if _BIAS.search(leaf):
        return Role("bias")
    if is_a(owner, "MultiheadAttention") and leaf == "in_proj_weight":
        return _attention("qkv", path, "qkv_proj", parameter, modules)
    if type(owner).__name__.endswith("Experts") and parameter.ndim == 3:
        return Role("mlp", output_axis=1)
    if not is_a(owner, "Linear", "Conv1D") or leaf != "weight":
        return Role("other")
    parts = path.split(".")
    axis = 1 if is_a(owner, "Conv1D") else 0
    if any("att" in part.lower() for part in parts[:-1]):
        kind = "qkv" if called in _FUSED else _ROLES.get(called, "linear")
        if kind == "linear":
            return Role("linear", axis)
        return _attention(kind, path, called, parameter, modules, axis)
    # Blocks are numbered; the linear layers of a block outside attention are its feed-forward part.
    return Role("mlp" if any(part.isdigit() for part in parts) else "linear", axis)


def _embeds(path: str, modules: Mapping[str, Any]) -> bool:
    """Whether a parameter's owner is or belongs to a module such as `ViTEmbeddings`."""
    parts = path.split(".")
    above = (modules[".".join(parts[:n])] for n in range(1, len(parts) + 1))
    return any("Embeddings" in type(module).__name__ for module in above)


def _attention(
    kind: str,
    path: str,
    called: str,
    parameter: torch.nn.Parameter,
    modules: Mapping[str, Any],
    axis: int = 0,
) -> Role:
    heads, width = _heads(path, modules)
    parts = path.split(".")
    last = max((n for n, part in enumerate(parts[:-1]) if "att" in part.lower()), default=-2)
    layer = ".".join(parts[: last + 1]) if last >= 0 else path
    if kind != "qkv":
        return Role(kind, axis, layer, width)
    if heads and width:
        spans = _fused_spans(called, parameter.shape[axis], heads, width, parts, modules)
        return Role(kind, axis, layer, width, spans)
    return Role(kind, axis, layer, width)


def _heads(path: str, modules: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Query heads and their width, from the nearest config (or MultiheadAttention) above."""
    parts = path.split(".")
    for n in range(len(parts), -1, -1):
        module = modules[".".join(parts[:n])]
        if is_a(module, "MultiheadAttention"):
            return int(module.num_heads), int(module.head_dim)
        config: Any = getattr(module, "config", None)
        heads = getattr(config, "num_attention_heads", None)
        if isinstance(heads, int):
            width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
            return heads, int(width or config.hidden_size // heads)
    return None, None


def _fused_spans(
    called: str,
    features: int,
    heads: int,
    width: int,
    parts: list[str],
    modules: Mapping[str, Any],
) -> dict[str, Spans]:
    """Where q, k and v lie in a fused weight, for the layouts that are known for certain."""
    queries = heads * width
    if called == "in_proj":  # DeBERTa v1: q, k and v of a head side by side
        known = is_a(modules[".".join(parts[:-1])], "DisentangledSelfAttention")
        if not known or features != 3 * queries:
            return {}
        starts = [(3 * h * width, (3 * h + 1) * width) for h in range(heads)]
        return {
            role: [(a + n * width, b + n * width) for a, b in starts]
            for n, role in enumerate("qkv")
        }
    keys, odd = divmod(features - queries, 2)  # fewer than queries where heads share them
    transposed = is_a(modules[".".join(parts)], "Conv1D") and keys == queries  # GPT-2
    if odd or keys <= 0 or keys % width or not (called == "qkv_proj" or transposed):
        return {}
    ends = {"q": (0, queries), "k": (queries, queries + keys), "v": (queries + keys, features)}
    return {
        role: [(start, start + width) for start in range(first, last, width)]
        for role, (first, last) in ends.items()
    }
