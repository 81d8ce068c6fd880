"""Bottleneck adapters in live models: where they stand, what they compute, and that they leave."""

from __future__ import annotations

import copy
import hashlib
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from bottleneck_lab import FAMILIES, IDS, SIZES, Family, outputs, put_naive, stands
from torch.nn import functional

from deltakit.adapters.attach import Attached, attach
from deltakit.adapters.bottleneck import inject
from deltakit.adapters.bottleneck_config import bottleneck_config
from deltakit.adapters.bottleneck_places import bottleneck_places

KINDS = ["houlsby", "pfeiffer", "parallel"]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
at_all_places = pytest.mark.parametrize("kind", ["houlsby", "parallel"])
every_kind = pytest.mark.parametrize("kind", KINDS)
BERT = FAMILIES[0]


def put(model: Any, kind: str, **options: Any) -> Attached:
    """An adapter, all of whose values are drawn at random."""
    attached = attach(model, kind, options, seed=1, base=None)
    fill(attached.parameters)
    return attached


def fill(parameters: Mapping[str, torch.nn.Parameter]) -> None:
    state = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=state))


@every_family
@at_all_places
def test_a_zero_up_projection_changes_no_bit(family: Family, kind: str) -> None:
    model = family.model().requires_grad_(requires_grad=False)  # torch's matmul depends on it
    plain = outputs(model)
    attached = attach(model, kind, {"initial": "zero"}, seed=1, base=None)
    assert any(parameter.any() for parameter in attached.parameters.values())
    assert torch.equal(outputs(model).view(torch.int32), plain.view(torch.int32))
    model.train()
    torch.manual_seed(5)
    dropped = outputs(model)
    attached.detach()
    torch.manual_seed(5)
    assert torch.equal(outputs(model), dropped)  # an adapter draws nothing


@every_family
@every_kind
def test_it_computes_what_the_papers_say(family: Family, kind: str) -> None:
    """Against the blocks of each architecture written out, in float64."""
    model, naive = family.model(torch.float64), family.model(torch.float64)
    plain = outputs(model)
    options = {"scaling": 0.5, "activation": "tanh", "bottleneck": 3}
    attached = put(model, kind, **options)

    def adapter_at(module: str) -> Any:
        part = {
            p: attached.parameters[f"{module}.adapter.{p}"]
            for p in ("down.weight", "down.bias", "up.weight", "up.bias")
        }

        def change(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            read = x if kind == "parallel" else y
            hidden = torch.tanh(read @ part["down.weight"].T + part["down.bias"])
            return y + 0.5 * (hidden @ part["up.weight"].T + part["up.bias"])

        return change

    places = put_naive(naive, family, kind, adapter_at)
    assert sorted({name.split(".adapter.")[0] for name in attached.parameters}) == sorted(places)
    assert len(places) >= 2 * len(stands(family, kind))
    assert torch.allclose(outputs(model), outputs(naive), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(outputs(model), plain, rtol=1e-3)


@every_family
@at_all_places
def test_it_leaves_without_a_trace(family: Family, kind: str) -> None:
    model = family.model()
    modules, names = list(model.modules()), list(model.state_dict())
    bits = copy.deepcopy(model.state_dict())
    plain = outputs(model)
    attached = put(model, kind)
    assert names == [name for name in model.state_dict() if ".adapter." not in name]
    mine = dict(model.named_parameters())
    for name, parameter in attached.parameters.items():
        assert mine[name] is parameter and parameter.requires_grad
    assert sum(p.requires_grad for p in model.parameters()) == len(attached.parameters)
    attached.detach()
    attached.detach()  # a second time does nothing
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(outputs(model), plain)


def test_seeds_rebuild_the_bits_in_a_fresh_process() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_bottleneck import digest_of\n"
        "print(*map(digest_of, sys.argv[2:]))"
    )
    here = str(Path(__file__).parent)
    run = subprocess.run(
        [sys.executable, "-c", code, here, *KINDS], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [digest_of(kind) for kind in KINDS]


def digest_of(kind: str) -> str:
    """Of the initial values and the check value of an adapter of seed 7."""
    attached = attach(BERT.model(), kind, {}, seed=7, base=None)
    digest = hashlib.sha256(attached.adapter.check.encode())
    for name, parameter in attached.parameters.items():
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[5]], ids=["bert", "opt"])
@every_kind
def test_copies_and_pickles_have_adapters_of_their_own(family: Family, kind: str) -> None:
    model = family.model()
    put(model, kind)
    adapted = outputs(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other), adapted)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if ".adapter." in name:
                    parameter.zero_()
        assert not torch.equal(outputs(other), adapted)
        assert torch.equal(outputs(model), adapted)


@pytest.mark.parametrize("family", [FAMILIES[4], FAMILIES[5]], ids=["llama", "opt"])
@every_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    family: Family, kind: str, reentrant: bool
) -> None:
    def gradients(*, checkpointing: bool) -> list[torch.Tensor]:
        model = family.model()
        attached = put(model, kind, bottleneck=4, activation="gelu")
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.config.dropout = 0
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        outputs(model).square().sum().backward()
        copy.deepcopy(model)  # nothing is left over from backward that cannot be copied
        return [parameter.grad for parameter in attached.parameters.values()]  # type: ignore[misc]

    plain = gradients(checkpointing=False)
    for again, expected in zip(gradients(checkpointing=True), plain, strict=True):
        assert expected.any() and torch.equal(again, expected)


@pytest.mark.parametrize("family, kind", [(BERT, "houlsby"), (FAMILIES[5], "parallel")])
def test_it_compiles_without_a_break(family: Family, kind: str) -> None:
    model = family.model()
    put(model, kind)
    eager = outputs(model)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.allclose(outputs(model), eager, rtol=1e-5, atol=1e-6)


@every_kind
def test_half_precision_bases_keep_their_dtype(kind: str) -> None:
    """Parameters are float32; the sum is made in float32 and rounded once."""
    model = BERT.model(torch.bfloat16)
    attached = put(model, kind)
    assert all(p.dtype == torch.float32 for p in attached.parameters.values())
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    layer = model.encoder.layer[0].output.dense
    naive: list[torch.Tensor] = []
    reads = model.encoder.layer[0].intermediate.dense if kind == "parallel" else None

    def look(module: Any, inputs: Any, output: torch.Tensor) -> None:
        seen.append((inputs[0], output))

    layer.register_forward_hook(look)
    if reads is not None:
        reads.register_forward_hook(lambda module, inputs, output: naive.append(inputs[0]))
    outputs(model)
    hidden, result = seen[0]
    y = functional.linear(hidden, layer.weight, layer.bias)
    x = naive[0] if naive else y
    adapter = layer.adapter
    activation = functional.gelu if kind == "houlsby" else functional.relu
    change = adapter.up(activation(adapter.down(x.float())))
    scaling = 4 if kind == "parallel" else 1
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, (y.float() + change * scaling).bfloat16())


@every_kind
def test_autocast_runs_the_adapter_in_the_low_precision(kind: str) -> None:
    model = BERT.model()
    attached = put(model, kind)
    wide = outputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = outputs(model)
        narrow.float().sum().backward()
    assert torch.allclose(narrow.float(), wide, rtol=0.2, atol=0.2)
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in attached.parameters.values()
    )


@pytest.mark.parametrize("bits", [4, 8])
@every_kind
def test_it_stands_at_quantised_layers(bits: int, kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = BERT.model()
    layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    for name in layers:
        above, leaf = name.rpartition(".")[::2]
        old = model.get_submodule(name)
        if bits == 4:
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False)
        new.load_state_dict(old.state_dict())
        setattr(model.get_submodule(above), leaf, new)
    model.to("cpu").eval()
    plain = outputs(model)
    for parameter in model.parameters():
        parameter.requires_grad_(requires_grad=False)
    config = bottleneck_config(kind, {"bottleneck": 3})
    places = list(bottleneck_places(model, kind))
    injection = inject(model, kind, config, places)
    assert torch.equal(outputs(model), plain)  # zero until values are loaded
    parameters = {f"{m}.{p}": t for m, ps in injection.parameters.items() for p, t in ps.items()}
    fill(parameters)
    assert all(p.dtype == torch.float32 for p in parameters.values())
    adapted = outputs(model)
    assert not torch.allclose(adapted, plain)
    adapted.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in parameters.values())
    injection.remove()
    assert torch.equal(outputs(model), plain)


def test_several_stand_in_one_model() -> None:
    """At different layers; each leaves alone, whichever came first."""
    model = BERT.model()
    plain = outputs(model)
    one = put(model, "pfeiffer", bottleneck=2)
    after_one = outputs(model)
    places = [place for place in bottleneck_places(model, "houlsby") if "attention" in place]
    two = inject(model, "houlsby", bottleneck_config("houlsby", {}), places)
    fill(two.parameters[places[0]])
    assert not torch.equal(outputs(model), after_one)
    one.detach()
    alone = outputs(model)
    assert not torch.equal(alone, plain)
    two.remove()
    assert torch.equal(outputs(model), plain)


@pytest.mark.parametrize(
    "head, labels",
    [
        (tf.BertForSequenceClassification, torch.tensor([0, 1])),
        (tf.BertForTokenClassification, torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 0]])),
    ],
)
@every_kind
def test_sequence_and_token_tasks_are_learnt(head: Any, labels: torch.Tensor, kind: str) -> None:
    torch.manual_seed(0)
    model = head(tf.BertConfig(**SIZES)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    options = {"bottleneck": 4, "initial": 0.3, "activation": "gelu", "scaling": 1.0}
    attached = attach(model, kind, options, seed=1, base=None)
    assert all(".adapter." in n for n, p in model.named_parameters() if p.requires_grad)
    optimizer = torch.optim.Adam(attached.parameters.values(), lr=0.02)
    losses = []
    for _ in range(40):
        loss = model(input_ids=IDS, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.85 * losses[0]
