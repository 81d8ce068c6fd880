"""Adapters in live models: values from the seed, back again from the file, and out without trace."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attach_lab import (
    BERT,
    FAMILIES,
    GPT2,
    LLAMA,
    T5,
    VIT,
    Family,
    delta_of,
    outputs,
    parameters_with_flags,
    same_modules,
    train,
    weights,
)

from deltakit.adapters.attach import attach, reattach
from deltakit.adapters.initial import all_initial_values
from deltakit.adapters.peft_kinds import PEFT_KINDS
from deltakit.errors import BaseMismatchError, ConfigError, CoordinateError, DeltaError
from deltakit.formats.checkpoint import Checkpoint

# Options small enough for layers of 16 features.
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 6, "use_rslora": True, "alpha_pattern": {"value": 3}},
    "dora": {"rank": 4},
    "adalora": {"rank": 4},
    "ia3": {},
    "loha": {"rank": 4},
    "lokr": {"rank": 2, "decompose_both": True},
    "hira": {"rank": 4},
    "gralora": {"rank": 4},
    "delora": {"rank": 4},
    "vera": {"rank": 6},
    "fourierft": {"n_frequency": 20},
    "oft": {"oft_block_size": 4},
    "boft": {},
    "hra": {"rank": 4},
    "miss": {"rank": 4},
    "road": {"group_size": 4},
    "c3a": {"block_size": 4},
}
TRANSPOSED = [name for name, (_, _, kind) in PEFT_KINDS.items() if "Conv1D" in kind.layers]
CASES = [(kind, BERT) for kind in OPTIONS] + [(kind, GPT2) for kind in TRANSPOSED]
CASES += [("lora", family) for family in FAMILIES[2:]] + [("ia3", T5), ("ia3", LLAMA)]


def test_every_kind_of_peft_is_tried() -> None:
    assert OPTIONS.keys() == PEFT_KINDS.keys()


@pytest.mark.parametrize(
    ("kind", "family"), CASES, ids=[f"{kind}-{family.name}" for kind, family in CASES]
)
def test_a_trained_adapter_comes_back_and_goes_without_a_trace(
    kind: str, family: Family, tmp_path: Path
) -> None:
    model, inputs = family.load(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    modules, base = dict(model.named_modules()), weights(model)
    flags, plain = list(parameters_with_flags(model)), outputs(model, inputs)

    attached = attach(model, kind, OPTIONS[kind], seed=3, base=checkpoint)
    assert not any(module.training for module in model.modules())
    mine = {id(parameter) for parameter in attached.parameters.values()}
    assert all(p.requires_grad == (id(p) in mine) for p in model.parameters())
    delta = train(attached, checkpoint)
    trained = outputs(model, inputs)
    assert not torch.equal(trained, plain)
    attached.reset()
    assert delta_of(attached, checkpoint).nnz == 0
    for _ in range(2):  # a second time does nothing
        attached.detach()
        assert same_modules(model, modules)
        assert all(torch.equal(t, base[name]) for name, t in model.state_dict().items())
        assert list(parameters_with_flags(model)) == flags

    fresh, _ = family.load(tmp_path)
    again = reattach(fresh, delta, base=checkpoint)
    assert torch.equal(outputs(fresh, inputs), trained)
    assert delta_of(again, checkpoint).equals(delta)
    again.detach()
    assert torch.equal(outputs(fresh, inputs), plain)


@pytest.mark.parametrize("kind", OPTIONS)
def test_another_seed_or_configuration_is_refused(kind: str, tmp_path: Path) -> None:
    model, inputs = BERT.load(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    attached = attach(model, kind, OPTIONS[kind], seed=3, base=checkpoint)
    delta = train(attached, checkpoint)
    attached.detach()
    plain, modules = outputs(model, inputs), dict(model.named_modules())
    assert delta.adapter is not None
    config = {**delta.adapter.config, "more": 1}
    wrong = [replace(delta.adapter, config=config), replace(delta.adapter, check="0" * 16)]
    if any("constant" not in rule for rule in delta.adapter.initial.values()) or kind == "vera":
        wrong.append(replace(delta.adapter, seed=4))
    for adapter in wrong:
        with pytest.raises(BaseMismatchError, match="check value"):
            reattach(model, replace(delta, adapter=adapter), base=checkpoint)
        assert same_modules(model, modules)
        assert torch.equal(outputs(model, inputs), plain)


_AGAIN = """
import sys, torch
from pathlib import Path
from attach_lab import BERT
from test_adapter_attach import OPTIONS
from deltakit.adapters.attach import attach
from deltakit.formats.checkpoint import Checkpoint
folder = Path(sys.argv[1])
model, _ = BERT.load(folder)
for kind, options in OPTIONS.items():
    torch.manual_seed(99)
    found = attach(model, kind, options, seed=3, base=Checkpoint(folder))
    print("check", kind, found.adapter.check)
    found.detach()
"""


def test_a_fresh_process_gives_the_same_initial_values(tmp_path: Path) -> None:
    expected = []
    for kind, options in OPTIONS.items():
        model, _ = BERT.load(tmp_path)
        torch.manual_seed(1)  # nothing depends on torch's own generator, and it is left alone
        before = torch.get_rng_state()
        attached = attach(model, kind, options, seed=3, base=Checkpoint(tmp_path))
        assert torch.equal(torch.get_rng_state(), before)
        expected.append(f"check {kind} {attached.adapter.check}")
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", _AGAIN, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tests,
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("check ")] == expected


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "ia3", "loha", "lokr", "hira", "oft"])
def test_kinds_begin_with_the_base_itself(kind: str, tmp_path: Path) -> None:
    model, inputs = BERT.load(tmp_path)
    plain = outputs(model, inputs)
    attach(model, kind, OPTIONS[kind], seed=3, base=Checkpoint(tmp_path))
    tolerance = 1e-6 if kind == "dora" else 0  # its norms are summed in another order than torch's
    torch.testing.assert_close(outputs(model, inputs), plain, rtol=0, atol=tolerance)


def test_initial_values_spread_as_those_of_peft(tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model, _ = BERT.load(tmp_path)
    attached = attach(
        model, "lora", {"rank": 64}, target="all-linear", seed=0, base=Checkpoint(tmp_path)
    )
    ours = torch.cat([p.reshape(-1) for n, p in attached.parameters.items() if "lora_A" in n])
    attached.detach()
    inject_adapter_in_model(LoraConfig(r=64, target_modules="all-linear"), model)
    theirs = torch.cat([p.reshape(-1) for n, p in model.named_parameters() if "lora_A" in n])
    assert min(len(ours), len(theirs)) > 8000
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.02)
    assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.01)


@pytest.mark.parametrize("kind", OPTIONS)
def test_16_bit_bases_have_adapters_of_float32(kind: str, tmp_path: Path) -> None:
    model, inputs = LLAMA.load(tmp_path)
    attached = attach(model.bfloat16(), kind, OPTIONS[kind], seed=0, base=None)
    assert {p.dtype for p in attached.parameters.values()} == {torch.float32}
    delta = train(attached)
    trained = outputs(model, inputs)
    attached.detach()
    reattach(model, delta)
    assert torch.equal(outputs(model, inputs), trained)


def test_patterns_of_ranks_name_modules_as_the_checkpoint_does(tmp_path: Path) -> None:
    """Merging knows no others."""
    model, _ = BERT.load(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    end, whole = "layer.0.attention.self.query", "bert.encoder.layer.0.attention.self.query"
    with pytest.raises(ConfigError, match=r"fits 'bert.*' alone, which the checkpoint calls 'enc"):
        options = {"alpha_pattern": {whole: 2}}
        attach(model, "lora", options, seed=0, base=checkpoint)
    attached = attach(model, "lora", {"rank_pattern": {end: 3}, "rank": 2}, seed=0, base=checkpoint)
    ranks = [len(p) for name, p in attached.parameters.items() if "lora_A" in name]
    assert ranks == [3, 2, 2, 2]
    model, _ = VIT.load(tmp_path / "vit")  # the model calls it v_proj
    checkpoint = Checkpoint(tmp_path / "vit")
    attached = attach(model, "lora", {"rank_pattern": {"value": 3}}, seed=0, base=checkpoint)
    ranks = [len(p) for name, p in attached.parameters.items() if "lora_A" in name]
    assert ranks == [8, 3, 8, 3]


def test_what_cannot_be_attached_leaves_the_model_alone(tmp_path: Path) -> None:
    model, inputs = GPT2.load(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    modules, plain = dict(model.named_modules()), outputs(model, inputs)
    flags = list(parameters_with_flags(model))

    def refused(error: type[Exception], match: str, kind: str = "lora", **more: Any) -> None:
        options = more.pop("options", {})
        with pytest.raises(error, match=match):
            attach(model, kind, options, seed=0, base=checkpoint, **more)
        assert same_modules(model, modules)
        assert torch.equal(outputs(model, inputs), plain)
        assert list(parameters_with_flags(model)) == flags

    refused(ConfigError, "unknown adapter 'lorra'; nearest: lora", kind="lorra")
    refused(ConfigError, "virtual tokens", kind="prefix-tuning")
    refused(ConfigError, "no option 'ranks'; nearest: rank", options={"ranks": 4})
    refused(ConfigError, "peft does not attach it", options={"rank": -1})
    refused(ConfigError, "takes no Linear whose weight", kind="boft")
    refused(ConfigError, "matches no tensor", target="nowhere")
    refused(ConfigError, "takes no Linear or Conv1D", target="embeddings")
    attached = attach(model, "lora", {}, seed=0, base=checkpoint)
    delta = train(attached)
    attached.detach()
    with pytest.raises(DeltaError, match="not of an adapter"):
        reattach(model, replace(delta, adapter=None))
    other, _ = LLAMA.load(tmp_path / "llama")
    with pytest.raises(CoordinateError, match=r"no module .*c_attn"):
        reattach(other, delta)


def test_modules_are_named_as_the_checkpoint_has_them(tmp_path: Path) -> None:
    model, _ = BERT.load(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    attached = attach(
        model, "lora", {}, target="*.query.weight", seed=0, base=checkpoint, exclude="*.1.*"
    )
    module = "encoder.layer.0.attention.self.query"
    assert attached.modules == {module: f"{module}.weight"}
    assert list(attached.parameters) == [f"{module}.lora_A.weight", f"{module}.lora_B.weight"]
    names = attached.where.names
    assert names[f"bert.{module}.base_layer.weight"] == f"{module}.weight"
    assert names[f"bert.{module}.lora_A.default.weight"] == f"{module}.lora_A.weight"
    assert names["classifier.weight"] is None
    assert set(attached.identity(checkpoint).tensors) == {f"{module}.weight"}
    all_initial_values(delta_of(attached, checkpoint))


def test_a_weight_that_two_layers_share_holds_no_adapter() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(CoordinateError, match=r"is also '1.weight'.*exclude it"):
        attach(model, "lora", {}, target="0", seed=0, base=None)


def test_adapters_of_one_family_stand_side_by_side(tmp_path: Path) -> None:
    model, inputs = BERT.load(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    modules, plain = dict(model.named_modules()), outputs(model, inputs)
    scaling = attach(model, "ia3", {}, target="attention-qv", seed=0, base=checkpoint)
    rescaled = train(scaling, checkpoint)
    scaling.detach()
    first = attach(model, "lora", {"rank": 2}, seed=0, base=checkpoint)
    with pytest.raises(ConfigError, match="adapter 'lora' stands in the model"):
        attach(model, "lora", {}, seed=0, base=checkpoint)
    one = train(first, checkpoint)
    alone = outputs(model, inputs)
    second = reattach(model, one, base=checkpoint)
    assert not torch.equal(outputs(model, inputs), alone)
    with pytest.raises(ConfigError, match=r"cannot stand at .*, where 'lora' stands"):
        reattach(model, rescaled, base=checkpoint)
    first.detach()
    assert torch.equal(outputs(model, inputs), alone)
    second.detach()
    assert same_modules(model, modules)
    assert torch.equal(outputs(model, inputs), plain)
    assert all(requires_grad for _, requires_grad in parameters_with_flags(model))
