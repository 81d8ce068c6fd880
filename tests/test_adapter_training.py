"""Training entries of adapters: exact budgets, and nothing but chosen entries moves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import write_bert
from transformers import BertForSequenceClassification

import deltakit as dk
from deltakit.adapters.attach import Attached, attach
from deltakit.adapters.initial import all_initial_values, trained_values
from deltakit.errors import ConfigError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.selection.recipe import make_method
from deltakit.training.presets import ADAPTERS

SEED = 3
REFUSED = {("lora", "snip"), ("lora", "grasp")}  # products of weight and gradient
KINDS = {"lora": {"rank": 4}, "pfeiffer": {"reduction_factor": 4}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


def load(base: Path) -> BertForSequenceClassification:
    torch.manual_seed(1)
    model: BertForSequenceClassification = BertForSequenceClassification.from_pretrained(base)
    return model.eval()


def attached(model: torch.nn.Module, base: Path, kind: str = "lora", seed: int = SEED) -> Attached:
    return attach(model, kind, KINDS[kind], seed=seed, base=Checkpoint(base))


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(5, 20, (4, 8), generator=generator),
            "labels": torch.randint(0, 2, (4,), generator=generator),
        }
        for _ in range(count)
    ]


def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = model(**batch).loss
    return loss


def train(tuner: dk.SparseTuner, steps: int = 4) -> None:
    for batch in batches(steps):
        loss_of(tuner.model, batch).backward()  # type: ignore[no-untyped-call]
        tuner.step()


def live_values(adapter: Attached) -> dict[str, np.ndarray[Any, Any]]:
    return {name: p.detach().numpy().copy() for name, p in adapter.parameters.items()}


def method(name: str, budget: int) -> Any:
    more: dict[str, Any] = {
        "id3": {"unmask_fraction": 0.5},
        "lt-sft": {"dense_steps": 2, "dense_lr": 1e-2},
        "fish": {"num_samples": 4},
        "repeat": {"every": 1},
        "drop-and-grow": {"every": 1},
    }.get(name, {})
    return make_method(name, budget, more)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in KINDS
        for name in ADAPTERS
        if name != "mask" and (kind, name) not in REFUSED
    ],
)
def test_every_method_trains_an_exact_budget_of_an_adapter(
    name: str, kind: str, base: Path, tmp_path: Path
) -> None:
    """The file rebuilds the live adapter to the bit; the base and all other entries keep theirs."""
    model = load(base)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapter = attached(model, base, kind)
    budget = 50
    tuner = dk.SparseTuner(
        model,
        method(name, budget),
        lr=1e-2,
        adapter=adapter,
        base=base,
        total_steps=4,
        calibration=dk.Batches(batches(4), loss_of),
    )
    train(tuner)
    dk.save(tuner.delta(), tmp_path / "a.sdelta")
    delta = dk.load(tmp_path / "a.sdelta")
    if name == "bernoulli":
        assert delta.nnz == tuner.budget
    else:
        assert delta.nnz == budget
    initial, trained = all_initial_values(delta), trained_values(delta)
    for tensor, values in live_values(adapter).items():
        assert trained[tensor].tobytes() == values.tobytes()
        others = np.ones(values.size, bool)
        others[delta.tensors[tensor].indices] = False
        assert (initial[tensor].ravel()[others] == values.ravel()[others]).all()
    assert any((initial[n] != v).any() for n, v in trained.items())
    adapter.detach()
    for n, p in model.named_parameters():
        if "classifier" not in n:  # the head is an extra
            assert torch.equal(p, before[n])
    assert set(delta.extras) == {n for n in before if "classifier" in n}


SPARSE_ADAPTER = {
    "random": ("random", {}),
    "erdos-renyi": ("random", {"allocation": "erdos-renyi"}),
    "magnitude": ("super-tuning", {}),
    "snip": ("snip", {"num_batches": 1}),
    "grasp": ("grasp", {}),
}


@pytest.mark.parametrize(
    ("kind", "criterion"),
    [(kind, c) for kind in KINDS for c in SPARSE_ADAPTER if (kind, c) not in REFUSED],
)
def test_sparse_adapter_leaves_zeros_elsewhere(criterion: str, kind: str, base: Path) -> None:
    """He et al. 2022: the mask's entries start from their initial values, all others are zero."""
    name, more = SPARSE_ADAPTER[criterion]
    model = load(base)
    adapter = attached(model, base, kind)
    first = live_values(adapter)
    tuner = dk.SparseTuner(
        model,
        make_method(name, 60, more),
        lr=0.0,
        adapter=adapter,
        masked="zero",
        base=base,
        calibration=dk.Batches(batches(2), loss_of),
    )
    delta = tuner.delta()
    assert sum(len(t.indices) for t in tuner.engine.entries.targets) == 60
    for tensor, values in live_values(adapter).items():
        kept = np.zeros(values.size, bool)
        kept[delta.tensors[tensor].indices] = True
        assert (values.ravel()[kept] == first[tensor].ravel()[kept]).all()
        assert (values.ravel()[~kept] == 0).all()
        assert trained_values(delta)[tensor].tobytes() == values.tobytes()


@pytest.mark.parametrize("criterion", ["snip", "grasp"])
def test_products_of_weight_and_gradient_are_refused_where_one_is_zero(
    criterion: str, base: Path
) -> None:
    model = load(base)
    name, more = SPARSE_ADAPTER[criterion]
    with pytest.raises(ConfigError, match=f"{criterion} scores weight times gradient"):
        dk.SparseTuner(model, make_method(name, 60, more), adapter=attached(model, base), base=base)


def test_a_support_under_which_the_adapter_stays_zero_is_refused(base: Path) -> None:
    model = load(base)
    largest = make_method("super-tuning", 20, {"allocation": "global"})
    with pytest.raises(ConfigError, match=r"no entry of lora_B.weight is chosen"):
        dk.SparseTuner(model, largest, adapter=attached(model, base), base=base)


def test_masked_zero_needs_a_support_before_training(base: Path) -> None:
    model = load(base)
    with pytest.raises(ConfigError, match="chosen before training"):
        dk.SparseTuner(
            model,
            dk.ID3(budget=10, steps=2),
            adapter=attached(model, base),
            masked="zero",
            base=base,
        )
    with pytest.raises(ConfigError, match="for adapters"):
        dk.SparseTuner(load(base), dk.RandomMask(budget=10), masked="zero", base=base)


def test_a_second_tuner_starts_from_the_initial_values(base: Path) -> None:
    model = load(base)
    adapter = attached(model, base)
    first = live_values(adapter)
    options: dict[str, Any] = {"lr": 1e-2, "adapter": adapter, "base": base}
    tuner = dk.SparseTuner(model, dk.RandomMask(budget=20), masked="zero", **options)
    train(tuner, 2)
    tuner.close()
    dk.SparseTuner(model, dk.RandomMask(budget=20), **options)
    assert all((first[n] == v).all() for n, v in live_values(adapter).items())


def test_training_resumes_to_the_same_bits(base: Path) -> None:
    def tuner() -> tuple[dk.SparseTuner, Attached]:
        model = load(base)
        adapter = attached(model, base)
        recipe = dk.ID3(budget=40, steps=4)
        return dk.SparseTuner(model, recipe, lr=1e-2, adapter=adapter, base=base), adapter

    whole, adapter = tuner()
    train(whole, 4)
    first, _ = tuner()
    train(first, 2)
    second, other = tuner()
    second.load_state_dict(first.state_dict())
    for batch in batches(4)[2:]:
        loss_of(second.model, batch).backward()  # type: ignore[no-untyped-call]
        second.step()
    assert second.delta().equals(whole.delta())
    assert all((v == live_values(other)[n]).all() for n, v in live_values(adapter).items())


def test_going_on_from_a_delta_of_the_same_adapter_alone(base: Path) -> None:
    model = load(base)
    tuner = dk.SparseTuner(
        model, dk.RandomMask(budget=20), lr=1e-2, adapter=attached(model, base), base=base
    )
    train(tuner, 2)
    earlier = tuner.delta()
    again = load(base)
    more = dk.SparseTuner(
        again,
        dk.RandomMask(budget=30),
        adapter=attached(again, base),
        base=base,
        init_delta=earlier,
    ).delta()
    assert more.nnz == 30
    assert all(
        np.isin(t.indices, more.tensors[n].indices).all() for n, t in earlier.tensors.items()
    )
    other = load(base)
    with pytest.raises(ConfigError, match="other configuration or seed"):
        dk.SparseTuner(
            other,
            dk.RandomMask(budget=30),
            adapter=attached(other, base, seed=SEED + 1),
            base=base,
            init_delta=earlier,
        )


def test_another_process_rebuilds_the_same_initial_values(base: Path, tmp_path: Path) -> None:
    model = load(base)
    adapter = attached(model, base)
    tuner = dk.SparseTuner(model, dk.RandomMask(budget=5), adapter=adapter, base=base)
    dk.save(tuner.delta(), tmp_path / "a.sdelta")
    code = (
        "import sys, hashlib, deltakit as dk\n"
        "from deltakit.adapters.initial import all_initial_values\n"
        "for name, values in all_initial_values(dk.load(sys.argv[1])).items():\n"
        "    print(name, hashlib.sha256(values.tobytes()).hexdigest())\n"
        "assert 'torch' not in sys.modules\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.sdelta")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    import hashlib

    expected = [
        f"{name} {hashlib.sha256(values.tobytes()).hexdigest()}"
        for name, values in live_values(adapter).items()
    ]
    assert told.splitlines() == expected
