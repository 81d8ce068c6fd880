"""Options of bottleneck adapters, where they may stand, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from bottleneck_lab import FAMILIES, SIZES
from torch.nn import functional

from deltakit.adapters.attach import attach
from deltakit.adapters.bottleneck import inject
from deltakit.adapters.bottleneck_config import ACTIVATIONS, bottleneck_config
from deltakit.adapters.bottleneck_module import activate
from deltakit.adapters.bottleneck_places import bottleneck_places
from deltakit.errors import ConfigError, CoordinateError

BERT = FAMILIES[0]
every_kind = pytest.mark.parametrize("kind", ["houlsby", "pfeiffer", "parallel"])
_NAIVE = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "leaky_relu": lambda x: torch.where(x > 0, x, x / 100),
    "elu": lambda x: torch.where(x > 0, x, torch.exp(x) - 1),
    "identity": lambda x: x,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_what_their_names_say(activation: str) -> None:
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    assert torch.allclose(activate(activation, x), _NAIVE[activation](x), atol=1e-12)


@every_kind
def test_initial_values_have_the_given_spread(kind: str) -> None:
    model = tf.BertModel(tf.BertConfig(**{**SIZES, "hidden_size": 256}))
    options = {"initial": 0.02, "reduction_factor": 2}
    attached = attach(model, kind, options, seed=1, base=None)
    for name, parameter in attached.parameters.items():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            assert abs(parameter.std().item() - 0.02) < 0.0005
            assert abs(parameter.mean().item()) < 0.0005


@pytest.mark.parametrize("factor, expected", [(2, 4), (3, 2), (16, 1), (0.5, 16)])
def test_the_reduction_factor_gives_the_width(factor: float, expected: int) -> None:
    attached = attach(BERT.model(), "pfeiffer", {"reduction_factor": factor}, seed=1, base=None)
    assert {
        tuple(p.shape) for n, p in attached.parameters.items() if n.endswith("down.weight")
    } == {(expected, 8)}


def test_targets_and_exclusions_choose_among_the_places() -> None:
    def at(**patterns: Any) -> list[str]:
        attached = attach(BERT.model(), "houlsby", {}, seed=1, base=None, **patterns)
        return list(attached.modules)

    attention = [f"encoder.layer.{n}.attention.output.dense" for n in (0, 1)]
    forward = [f"encoder.layer.{n}.output.dense" for n in (0, 1)]
    assert at() == sorted([*attention, *forward])
    assert at(target="attention") == attention
    assert at(target="mlp") == forward
    assert at(exclude="encoder.layer.0") == [attention[1], forward[1]]
    with pytest.raises(ConfigError, match="none of the layers that it can stand at"):
        at(target="*.query.weight")


def test_without_the_residual_it_takes_the_layer_s_place() -> None:
    model = BERT.model()
    options = {"residual": False, "bottleneck": 3, "initial": 0.3}
    attach(model, "pfeiffer", options, seed=1, base=None)
    layer = model.encoder.layer[0].output.dense
    x = torch.ones(2, 12)
    y = functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), layer.adapter.up(torch.relu(layer.adapter.down(y))))


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("pfeiffer", {"reduction": 2}, "no option 'reduction'"),
        ("pfeiffer", {"bottleneck": 2, "reduction_factor": 2}, "takes one of"),
        ("pfeiffer", {"bottleneck": 0}, "whole number from 1"),
        ("pfeiffer", {"bottleneck": 2.5}, "whole number from 1"),
        ("pfeiffer", {"bottleneck": True}, "whole number from 1"),
        ("pfeiffer", {"reduction_factor": 0}, "above 0"),
        ("pfeiffer", {"activation": "rellu"}, "nearest: relu"),
        ("pfeiffer", {"scaling": "big"}, "scaling must be a number"),
        ("pfeiffer", {"residual": 1}, "true or false"),
        ("parallel", {"residual": False}, "residual cannot be false"),
        ("pfeiffer", {"initial": 0}, "standard deviation above 0 or 'zero'"),
        ("pfeiffer", {"initial": "one"}, "standard deviation above 0 or 'zero'"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    kind: str, options: dict[str, Any], message: str
) -> None:
    model = BERT.model()
    with pytest.raises(ConfigError, match=message):
        attach(model, kind, options, seed=1, base=None)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@every_kind
def test_a_configuration_is_its_own(kind: str) -> None:
    for options in ({}, {"bottleneck": 5}, {"rank": 5}, {"reduction_factor": 4.0}):
        config = bottleneck_config(kind, options)
        assert bottleneck_config(kind, config) == config


def _mixture() -> Any:
    sizes = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 2}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**sizes))


def _mamba() -> Any:
    return tf.MambaForCausalLM(tf.MambaConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1))


def _torch_encoder() -> Any:
    layer = torch.nn.TransformerEncoderLayer(8, 2, 12)
    return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize(
    "make, kind",
    [
        (_mixture, "pfeiffer"),
        (_mamba, "parallel"),
        (_torch_encoder, "houlsby"),
        (lambda: torch.nn.Sequential(torch.nn.Linear(8, 8)), "pfeiffer"),
        (lambda: torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 8)), "houlsby"),
        (
            lambda: tf.ResNetModel(tf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])),
            "pfeiffer",
        ),
    ],
)
def test_unknown_architectures_are_refused(make: Any, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"has no known place in .*; use an adapter of single"):
        bottleneck_places(make(), kind)


def test_a_module_that_is_no_place_is_refused() -> None:
    config = bottleneck_config("pfeiffer", {})
    with pytest.raises(CoordinateError, match=r"cannot stand at 'pooler\.dense'"):
        inject(BERT.model(), "pfeiffer", config, ["pooler.dense"])
