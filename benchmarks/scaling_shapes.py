"""Names and shapes of models of 8, 70 and 405 billion and of a trillion weights.

Llama 3.1 from the published configurations of its three sizes. The trillion is a mixture of experts
with latent attention, of the kind and with the numbers of the published configuration of Kimi K2
(the architecture of DeepSeek-V3). Nothing is downloaded: shapes follow from a dozen numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Model:
    """A causal language model.

    layers: the tensors of every decoder layer, as a checkpoint names them. rest: embedding, last
    norm and head, which are FSDP's root unit. largest: elements of the largest tensor of the live
    model. fused: elements of a layer's experts, which transformers holds in two tensors of all.
    """

    name: str
    hidden: int
    vocabulary: int
    layers: tuple[Shapes, ...]
    rest: Shapes
    largest: int
    fused: int = 0

    @cached_property
    def tensors(self) -> Shapes:
        """All tensors by name in the checkpoint."""
        found = {"model.embed_tokens.weight": self.rest["model.embed_tokens.weight"]}
        for number, layer in enumerate(self.layers):
            found |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
        return found | self.rest

    @cached_property
    def weights(self) -> int:
        """Elements of all tensors."""
        return sum(map(elements, self.layers)) + elements(self.rest)

    @cached_property
    def rows(self) -> int:
        """Rows of all matrices."""
        return sum(shape[0] for shape in self.tensors.values() if len(shape) == 2)

    @property
    def fused_share(self) -> float:
        """The share of all weights that stand in experts held together."""
        mixed = sum("mlp.gate.weight" in layer for layer in self.layers)
        return mixed * self.fused / self.weights

    @property
    def unit(self) -> int:
        """Elements of the largest layer, the largest of FSDP's units but the root."""
        return max(map(elements, self.layers))

    @cached_property
    def features(self) -> int:
        """Inputs and outputs of the linear layers of the decoder, all together."""
        matrices = (s for layer in self.layers for s in layer.values() if len(s) == 2)
        return sum(map(sum, matrices))


def elements(shapes: Shapes) -> int:
    """How many numbers these tensors hold."""
    return sum(map(prod, shapes.values()))


def llama(
    name: str,
    *,
    layers: int,
    hidden: int,
    inner: int,
    heads: int,
    kv_heads: int = 8,
    vocabulary: int = 128_256,
) -> Model:
    """A `LlamaForCausalLM` whose head is not tied to its embedding."""
    narrow = hidden // heads * kv_heads
    layer: Shapes = {
        "input_layernorm.weight": (hidden,),
        **_mlp("mlp", hidden, inner),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.k_proj.weight": (narrow, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.v_proj.weight": (narrow, hidden),
    }
    rest = _rest(hidden, vocabulary)
    largest = max(prod(shape) for shape in (layer | rest).values())
    return Model(name, hidden, vocabulary, (layer,) * layers, rest, largest)


def mixture(
    name: str,
    *,
    layers: int,
    dense_layers: int,
    hidden: int,
    inner: int,
    experts: int,
    shared: int,
    expert_inner: int,
    heads: int,
    q_rank: int,
    kv_rank: int,
    nope: int,
    rope: int,
    value: int,
    vocabulary: int,
) -> Model:
    """A `DeepseekV3ForCausalLM`: latent attention, and experts in all but the first layers."""
    common: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.kv_a_layernorm.weight": (kv_rank,),
        "self_attn.kv_a_proj_with_mqa.weight": (kv_rank + rope, hidden),
        "self_attn.kv_b_proj.weight": (heads * (nope + value), kv_rank),
        "self_attn.o_proj.weight": (hidden, heads * value),
        "self_attn.q_a_layernorm.weight": (q_rank,),
        "self_attn.q_a_proj.weight": (q_rank, hidden),
        "self_attn.q_b_proj.weight": (heads * (nope + rope), q_rank),
    }
    routed: Shapes = {"mlp.gate.e_score_correction_bias": (experts,)}
    routed |= {"mlp.gate.weight": (experts, hidden)}
    routed |= _mlp("mlp.shared_experts", hidden, shared * expert_inner)
    for number in range(experts):
        routed |= _mlp(f"mlp.experts.{number}", hidden, expert_inner)
    first = (common | _mlp("mlp", hidden, inner),) * dense_layers
    others = (common | routed,) * (layers - dense_layers)
    fused = experts * 3 * expert_inner * hidden
    largest = fused // 3 * 2  # gate and up are one tensor
    rest = _rest(hidden, vocabulary)
    return Model(name, hidden, vocabulary, first + others, rest, largest, fused)


def _mlp(prefix: str, hidden: int, inner: int) -> Shapes:
    return {
        f"{prefix}.down_proj.weight": (hidden, inner),
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
    }


def _rest(hidden: int, vocabulary: int) -> Shapes:
    return {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }


MODELS = {
    "8B": llama("Llama 3.1 8B", layers=32, hidden=4096, inner=14_336, heads=32),
    "70B": llama("Llama 3.1 70B", layers=80, hidden=8192, inner=28_672, heads=64),
    "405B": llama("Llama 3.1 405B", layers=126, hidden=16_384, inner=53_248, heads=128),
    "1T": mixture(
        "Kimi K2's shape",
        layers=61,
        dense_layers=1,
        hidden=7168,
        inner=18_432,
        experts=384,
        shared=1,
        expert_inner=2048,
        heads=64,
        q_rank=1536,
        kv_rank=512,
        nope=128,
        rope=64,
        value=128,
        vocabulary=163_840,
    ),
}
