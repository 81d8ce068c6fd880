"""Tiny models of the families that bottleneck adapters know, and naive forms of their blocks.

A naive form rewrites a block's sum in place: it calls `change(x, y)`, x being what the sub-layer
reads and y the output of its projection, before dropout (which is off here) and the residual.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf

Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
SIZES = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 3, 4, 5, 2]])


@dataclass(frozen=True)
class Family:
    """An architecture, and the live names at which naive forms of its blocks are put.

    attention, forward: how the names of output projections end -> how to put a change there, given
    the module that holds the projection.
    """

    name: str
    make: Callable[[], Any]
    attention: Mapping[str, Callable[[Any, Change], None]]
    forward: Mapping[str, Callable[[Any, Change], None]]

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """A model of random weights, in evaluation mode."""
        torch.manual_seed(0)
        model: Any = self.make()
        torch.manual_seed(1)
        for parameter in model.parameters():  # biases and norms too
            torch.nn.init.normal_(parameter, std=0.3)
        return model.to(dtype).eval()

    def load(self, folder: Path) -> Any:
        """That model, saved to a folder and loaded from it."""
        model = self.model()
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder).eval()


def outputs(model: Any) -> torch.Tensor:
    """The last hidden states or the logits of the model for fixed inputs."""
    if hasattr(model.config, "image_size"):
        state = torch.Generator().manual_seed(0)
        pixels = torch.randn(2, 3, 8, 8, generator=state, dtype=torch.float64)
        return first(model(pixel_values=pixels.to(model.dtype)))
    if model.config.is_encoder_decoder:
        return first(model(input_ids=IDS, decoder_input_ids=IDS[:, :3]))
    return first(model(input_ids=IDS))


def first(output: Any) -> torch.Tensor:
    """What a model is asked for, of all that it gives."""
    tensor: torch.Tensor = output[0]
    return tensor


def _linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, tf.pytorch_utils.Conv1D):
        return x @ layer.weight + layer.bias
    y = x @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


def _projection(name: str) -> Callable[[Any, Change], None]:
    """Attention whose block adds the residual: the change is made to the projection's output."""

    def put(attention: Any, change: Change) -> None:
        layer = getattr(attention, name)
        layer.forward = lambda x: change(x, _linear(layer, x))

    return put


def _add_and_norm(output: Any, change: Change) -> None:
    """Modules of BERT and DeBERTa that project, add what they are given, and normalise."""
    output.forward = lambda h, x: output.LayerNorm(change(x, _linear(output.dense, h)) + x)


def _plain(first: str, last: str, activation: str) -> Callable[[Any, Change], None]:
    """A feed-forward of two layers in a module."""

    def put(forward: Any, change: Change) -> None:
        one, two, act = (getattr(forward, name) for name in (first, last, activation))
        forward.forward = lambda x: change(x, _linear(two, act(_linear(one, x))))

    return put


def _gated(gate: str, up: str, down: str, activation: str) -> Callable[[Any, Change], None]:
    """A gated feed-forward in a module."""

    def put(forward: Any, change: Change) -> None:
        a, b, two, act = (getattr(forward, name) for name in (gate, up, down, activation))
        forward.forward = lambda x: change(x, _linear(two, act(_linear(a, x)) * _linear(b, x)))

    return put


def _opt_forward(layer: Any, change: Change) -> None:
    """OPT's decoder layer calls fc1, the activation and fc2 itself: all of it moves into fc2."""
    one, two, act = layer.fc1, layer.fc2, layer.activation_fn
    one.forward = lambda x: x
    layer.activation_fn = torch.nn.Identity()
    two.forward = lambda x: change(x, _linear(two, act(_linear(one, x))))


def _t5(**more: Any) -> Any:
    config = tf.T5Config(
        vocab_size=30, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, **more
    )
    return tf.T5ForConditionalGeneration(config)


def _opt() -> Any:
    sizes = {**SIZES, "ffn_dim": 12, "word_embed_proj_dim": 8, "max_position_embeddings": 16}
    del sizes["intermediate_size"]
    return tf.OPTForCausalLM(tf.OPTConfig(**sizes))


def _gpt2() -> Any:
    config = tf.GPT2Config(
        vocab_size=30, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    return tf.GPT2LMHeadModel(config)


def _distilbert() -> Any:
    config = tf.DistilBertConfig(vocab_size=30, dim=8, n_layers=2, n_heads=2, hidden_dim=12)
    return tf.DistilBertModel(config)


def _vit() -> Any:
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    return tf.ViTForImageClassification(tf.ViTConfig(image_size=8, patch_size=4, **sizes))


def _deberta() -> Any:
    config = tf.DebertaV2Config(
        **SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=4
    )
    return tf.DebertaV2Model(config)


_ADD = {r"attention\.output\.dense": _add_and_norm}, {r"\d\.output\.dense": _add_and_norm}
_T5_ATTENTION = {"SelfAttention.o": _projection("o"), "EncDecAttention.o": _projection("o")}
FAMILIES = [
    Family("bert", lambda: tf.BertModel(tf.BertConfig(**SIZES)), *_ADD),
    Family("deberta", _deberta, *_ADD),
    Family(
        "distilbert",
        _distilbert,
        {"attention.out_lin": _projection("out_lin")},
        {"ffn.lin2": _plain("lin1", "lin2", "activation")},
    ),
    Family(
        "gpt2",
        _gpt2,
        {"attn.c_proj": _projection("c_proj")},
        {"mlp.c_proj": _plain("c_fc", "c_proj", "act")},
    ),
    Family(
        "llama",
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
        {"self_attn.o_proj": _projection("o_proj")},
        {"mlp.down_proj": _gated("gate_proj", "up_proj", "down_proj", "act_fn")},
    ),
    Family("opt", _opt, {"self_attn.out_proj": _projection("out_proj")}, {"fc2": _opt_forward}),
    Family("t5", _t5, _T5_ATTENTION, {"DenseReluDense.wo": _plain("wi", "wo", "act")}),
    Family(
        "t5-gated",
        lambda: _t5(feed_forward_proj="gated-gelu"),
        _T5_ATTENTION,
        {"DenseReluDense.wo": _gated("wi_0", "wi_1", "wo", "act")},
    ),
    Family(
        "vit",
        _vit,
        {"attention.o_proj": _projection("o_proj")},
        {"mlp.fc2": _plain("fc1", "fc2", "activation_fn")},
    ),
]


def stands(family: Family, kind: str) -> dict[str, Callable[[Any, Change], None]]:
    """Ending of the projections at which a kind of adapter stands -> naive form."""
    return {**(family.attention if kind == "houlsby" else {}), **family.forward}


def put_naive(
    model: Any, family: Family, kind: str, adapter_at: Callable[[str], Change]
) -> list[str]:
    """Rewrite the model's blocks with the changes that `adapter_at` gives each projection."""
    found = []
    for name in [name for name, _ in model.named_modules()]:
        for end, put in stands(family, kind).items():
            if re.search(rf"\.{end}$", name):
                put(model.get_submodule(name.rpartition(".")[0]), adapter_at(name))
                found.append(name)
    return found
