"""Masks: exact budgets, the structure they promise, seeds that repeat them, and small files."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import deltakit as dk
from deltakit.errors import BudgetError, ConfigError, CoordinateError
from deltakit.selection.bernoulli_mask import successes
from deltakit.selection.methods import Method
from deltakit.selection.recipe import make_method
from deltakit.training.config_file import resolve

SEEDED: dict[str, Callable[..., Any]] = {
    "random": dk.RandomMask,
    "bernoulli": dk.BernoulliMask,
    "rows": dk.RowMask,
    "columns": dk.ColumnMask,
    "blocks": lambda **options: dk.BlockMask(block_size=4, **options),
    "n:m": dk.NMMask,
}
EXACT = {name: make for name, make in SEEDED.items() if name != "bernoulli"}


def _net(width: int = 48) -> nn.Module:
    """Two matrices, their biases and a kernel, with weights of their own."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"a": nn.Linear(width, 64), "b": nn.Linear(64, width), "conv": nn.Conv2d(8, 6, 3)}
    )


def _delta(model: nn.Module, method: Any, **options: Any) -> dk.SparseDelta:
    """The support that a method chooses, as an untrained delta; the model is left alone."""
    return dk.SparseTuner(deepcopy(model), method, **options).delta()


def _supports(model: nn.Module, method: Any, **options: Any) -> dict[str, list[int]]:
    return {n: t.indices.tolist() for n, t in _delta(model, method, **options).tensors.items()}


def _mask(delta: dk.SparseDelta, name: str) -> np.ndarray[Any, Any]:
    tensor = delta.tensors[name]
    mask = np.zeros(tensor.shape, np.bool_)
    mask.reshape(-1)[tensor.indices] = True
    return mask


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("budget", [1, 7, 100, 1_001, 3_000])
def test_every_mask_meets_its_budget_exactly(name: str, budget: int) -> None:
    """With and without entries that must not be chosen; those stay free of it."""
    model, method = _net(), EXACT[name](budget=budget)
    assert _delta(model, method).nnz == budget
    avoid = _delta(model, dk.RandomMask(budget=500, seed=9))
    delta = _delta(model, method, avoid=[avoid])
    assert delta.nnz == budget
    for tensor in avoid.tensors.values():
        mine = delta.tensors.get(tensor.name)
        assert mine is None or not np.isin(mine.indices, tensor.indices).any()


@pytest.mark.parametrize("name", ["rows", "columns", "blocks", "random"])
def test_masks_may_take_every_entry(name: str) -> None:
    whole = sum(p.numel() for p in _net().parameters())
    assert _delta(_net(), EXACT[name](budget=whole)).nnz == whole


@pytest.mark.parametrize("name", SEEDED)
def test_seeds_repeat_masks_and_layers_differ(name: str) -> None:
    """The overlap of any two layers' or seeds' supports is near what chance gives."""
    model = nn.ModuleDict({n: nn.Linear(256, 256, bias=False) for n in "abc"})
    budget = 3 * 256 * 64  # a quarter
    first, again, other = (
        _supports(model, SEEDED[name](budget=budget, seed=seed)) for seed in (3, 3, 4)
    )
    assert first == again
    pairs = [(first[n], other[n]) for n in first]
    pairs += [(first[m], first[n]) for m, n in (("a.weight", "b.weight"), ("b.weight", "c.weight"))]
    for mine, yours in pairs:
        share = len(set(mine) & set(yours)) / len(mine)
        assert 0.05 < share < 0.45, share


@pytest.mark.parametrize("name", ["random", "bernoulli"])
def test_random_masks_are_stored_as_a_seed(name: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({n: nn.Linear(200, 200, bias=False) for n in "ab"})
    delta = _delta(model, SEEDED[name](budget=2_000, seed=7))
    for tensor in delta.tensors.values():
        assert tensor.seed == 7
    dk.save(delta, tmp_path / "d.sdelta")
    loaded = dk.load(tmp_path / "d.sdelta")
    assert {n: t.indices.tolist() for n, t in loaded.tensors.items()} == {
        n: t.indices.tolist() for n, t in delta.tensors.items()
    }
    coded = {t.coding for t in dk.inspect(tmp_path / "d.sdelta").tensors}
    assert coded == {"seeded"}


def test_bernoulli_counts_follow_the_binomial_distribution() -> None:
    """Mean and variance of Binomial(1000, 0.1) over 2000 seeds, five standard errors wide."""
    counts = np.array([successes(seed, "w", 1000, 0.1) for seed in range(2000)])
    assert abs(counts.mean() - 100) < 5 * np.sqrt(90 / 2000)
    assert abs(counts.var() / 90 - 1) < 5 * np.sqrt(2 / 2000)
    assert successes(0, "w", 77, 1.0) == 77 and successes(0, "w", 77, 0.0) == 0
    assert successes(0, "w", 2**20 + 5, 1.0) == 2**20 + 5


def test_the_budget_of_a_bernoulli_mask_is_what_was_drawn() -> None:
    model = _net()
    tuner = dk.SparseTuner(model, dk.BernoulliMask(probability=0.1, seed=1))
    delta = tuner.delta()
    total = sum(p.numel() for p in model.parameters())
    assert tuner.budget == tuner.unmasked == delta.nnz == delta.provenance["budget"]
    assert abs(delta.nnz - total / 10) < 5 * np.sqrt(total * 0.09)
    expected = dk.BernoulliMask(budget=total // 10, seed=1)
    assert abs(dk.SparseTuner(_net(), expected).budget - total / 10) < 5 * np.sqrt(total * 0.09)
    for p in (0.0, 1.1):
        with pytest.raises(ConfigError, match=r"probability must be in \(0, 1\]"):
            dk.BernoulliMask(probability=p)
    for both in ({}, {"probability": 0.1, "budget": 5}):
        with pytest.raises(ConfigError, match="either budget= or probability="):
            dk.BernoulliMask(**both)
    with pytest.raises(BudgetError, match="draws none of"):
        dk.SparseTuner(_net(), dk.BernoulliMask(probability=1e-12))


def test_a_bernoulli_mask_continues_from_a_delta_beside_its_entries() -> None:
    model = _net()
    earlier = _delta(model, dk.RandomMask(budget=3_000, seed=5))
    tuner = dk.SparseTuner(model, dk.BernoulliMask(probability=0.3, seed=5), init_delta=earlier)
    assert tuner.budget == tuner.unmasked == tuner.delta().nnz > 3_000


@pytest.mark.parametrize(("make", "axis"), [(dk.RowMask, 1), (dk.ColumnMask, 0)])
def test_rows_and_columns_are_whole_but_for_the_last(
    make: Callable[..., Method], axis: int
) -> None:
    """Every tensor has whole features of its own, and one of all tensors is cut."""
    delta = _delta(_net(), make(budget=1_000), target=["a.weight", "b.weight"])
    cut = 0
    for name in delta.tensors:
        covered = _mask(delta, name).mean(axis)
        cut += int(((covered > 0) & (covered < 1)).sum())
    assert len(delta.tensors) == 2 and cut <= 1


def test_first_and_last_columns() -> None:
    """40 entries are 8 columns of 5; 42 cut a ninth."""
    model = nn.Linear(20, 5)
    for budget, order, columns in ((40, "first", range(8)), (40, "last", range(12, 20))):
        mask = _mask(
            _delta(model, dk.ColumnMask(budget=budget, order=order), target="weight"), "weight"
        )
        assert mask.any(0).nonzero()[0].tolist() == list(columns) and mask.sum() == 40
    mask = _mask(_delta(model, dk.ColumnMask(budget=42, order="first"), target="weight"), "weight")
    assert mask[:, 8].tolist() == [True, True, False, False, False]
    mask = _mask(_delta(model, dk.RowMask(budget=23, order="first"), target="weight"), "weight")
    assert mask.sum(1).tolist() == [20, 3, 0, 0, 0]


def test_kernels_have_rows_and_columns_too() -> None:
    model = nn.Conv2d(8, 6, 3)
    mask = _mask(_delta(model, dk.ColumnMask(budget=108, order="first"), target="weight"), "weight")
    assert mask[:, :2].all() and not mask[:, 2:].any()
    mask = _mask(_delta(model, dk.RowMask(budget=72, order="last"), target="weight"), "weight")
    assert mask[5].all() and not mask[:5].any()


def test_transposed_weights_turn_rows_and_columns() -> None:
    """GPT-2's Conv1D [in, out]: an input feature is a row of the tensor."""
    model = _gpt2()
    name = "transformer.h.0.mlp.c_fc.weight"
    mask = _mask(_delta(model, dk.ColumnMask(budget=64, order="first"), target=name), name)
    assert mask[:2].all() and not mask[2:].any()
    mask = _mask(_delta(model, dk.RowMask(budget=16, order="first"), target=name), name)
    assert mask[:, :2].all() and not mask[:, 2:].any()
    mask = _mask(_delta(model, dk.NMMask(budget=128, n=2, m=4), target=name), name)
    assert (mask.reshape(2, 4, 32).sum(1) == 2).all()


def test_blocks_are_squares_but_for_the_last() -> None:
    model = nn.Linear(50, 30)  # edges that no block of 8 fills
    delta = _delta(model, dk.BlockMask(budget=200, block_size=8), target="weight")
    padded = np.zeros((32, 56), np.bool_)
    padded[:30, :50] = _mask(delta, "weight")
    full = np.zeros((32, 56), np.bool_)
    full[:30, :50] = True
    found = padded.reshape(4, 8, 7, 8).sum((1, 3))
    whole = full.reshape(4, 8, 7, 8).sum((1, 3))
    assert ((found > 0) & (found < whole)).sum() <= 1
    runs = _delta(model, dk.BlockMask(budget=11, block_size=4, order="first"), target="bias")
    assert runs.tensors["bias"].indices.tolist() == list(range(11))


@pytest.mark.parametrize("pick", ["random", "largest", "smallest"])
def test_n_of_m(pick: str) -> None:
    """At most N of M, the right ones, at full and at partial budgets."""
    model = nn.Linear(32, 16)
    size = model.weight.detach().abs().reshape(16, 8, 4)
    full = _mask(_delta(model, dk.NMMask(budget=256, pick=pick), target="weight"), "weight")
    groups = torch.from_numpy(full).reshape(16, 8, 4)
    assert (groups.sum(-1) == 2).all()
    if pick != "random":
        best = size.topk(2, largest=pick == "largest").indices
        assert torch.equal(groups.nonzero()[:, 2].reshape(16, 8, 2), best.sort().values)
    part = _mask(_delta(model, dk.NMMask(budget=101, pick=pick), target="weight"), "weight")
    counts = part.reshape(-1, 4).sum(1)
    assert (counts == 2).sum() == 50 and (counts == 1).sum() == 1 and counts.sum() == 101
    with pytest.raises(BudgetError, match="2 of every 4 weights of the targets are 256 entries"):
        dk.SparseTuner(model, dk.NMMask(budget=257), target="weight")


def _gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=4))


def _llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=12,
        )
    )


def test_heads_with_grouped_queries() -> None:
    """Half of all heads: per layer one group of two queries with its key, value and outputs."""
    model = _llama()
    layers = [f"model.layers.{n}.self_attn." for n in range(2)]
    budget = sum(p.numel() for n, p in model.named_parameters() if "self_attn" in n) // 2
    delta = _delta(model, dk.HeadMask(budget=budget, seed=1))
    for at in layers:
        keys = _mask(delta, f"{at}k_proj.weight").reshape(2, 4 * 16)
        group = int(keys.any(1).argmax())
        assert keys[group].all() and not keys[1 - group].any()
        queries = _mask(delta, f"{at}q_proj.weight").reshape(2, 8 * 16)
        assert queries[group].all() and not queries[1 - group].any()
        outputs = _mask(delta, f"{at}o_proj.weight").reshape(16, 2, 8)
        assert outputs[:, group].all() and not outputs[:, 1 - group].any()
    assert all("self_attn" in name for name in delta.tensors)
    assert _delta(model, dk.HeadMask(budget=101), target="attention-qv").nnz == 101
    with pytest.raises(BudgetError, match="the attention heads of the targets hold"):
        dk.SparseTuner(_llama(), dk.HeadMask(budget=2 * budget + 1))


def test_heads_of_a_fused_transposed_weight() -> None:
    """GPT-2: one head is a column band of each of q, k and v, and a row band of c_proj."""
    delta = _delta(_gpt2(), dk.HeadMask(budget=64, order="first"))
    fused = _mask(delta, "transformer.h.0.attn.c_attn.weight").any(0).reshape(3, 4, 2)
    assert fused[:, 0].all() and not fused[:, 1:].any()
    outputs = _mask(delta, "transformer.h.0.attn.c_proj.weight")
    assert outputs[:2].all() and not outputs[2:].any()


def test_heads_need_a_model_that_has_them() -> None:
    with pytest.raises(BudgetError, match="attention heads of the targets hold 0 of the 5"):
        dk.SparseTuner(_net(), dk.HeadMask(budget=5))
    model = nn.ModuleDict({"attention": nn.ModuleDict({"q_proj": nn.Linear(8, 8)})})
    with pytest.raises(ConfigError, match="does not say how its features form attention heads"):
        dk.SparseTuner(model, dk.HeadMask(budget=5))


def _index_bytes(delta: dk.SparseDelta, path: Path) -> int:
    dk.save(delta, path)
    return sum(tensor.index_bytes for tensor in dk.inspect(path).tensors)


@pytest.mark.parametrize("name", ["rows", "columns", "blocks"])
def test_structured_masks_make_small_files(name: str, tmp_path: Path) -> None:
    """Against a support of the same size without structure or seed."""
    model = nn.ModuleDict({n: nn.Linear(256, 256, bias=False) for n in "abcdefghijkl"})
    method = {
        "rows": dk.RowMask(budget=30_000),
        "columns": dk.ColumnMask(budget=30_000),
        "blocks": dk.BlockMask(budget=30_000),
    }[name]
    structured = _index_bytes(_delta(model, method), tmp_path / "s.sdelta")
    scattered = _supports(model, dk.RandomMask(budget=30_000))
    plain = dk.UserMask(mask=lambda n, w: np.array(scattered[n]))
    random = _index_bytes(_delta(model, plain), tmp_path / "r.sdelta")
    assert structured * {"rows": 50, "columns": 5, "blocks": 5}[name] < random


def test_user_masks_of_all_kinds_agree(tmp_path: Path) -> None:
    model = _net()
    wanted = _delta(model, dk.RandomMask(budget=321, seed=2))
    dk.save(wanted, tmp_path / "mask.sdelta")
    masks = {name: torch.from_numpy(_mask(wanted, name)) for name in wanted.tensors}
    expected = {name: t.indices.tolist() for name, t in wanted.tensors.items()}

    def function(name: str, weight: torch.Tensor) -> Any:
        assert weight.shape == dict(model.named_parameters())[name].shape
        return (
            torch.from_numpy(wanted.tensors[name].indices[::-1].copy()) if name in masks else None
        )

    for mask in (wanted, tmp_path / "mask.sdelta", str(tmp_path / "mask.sdelta"), masks, function):
        tuner = dk.SparseTuner(deepcopy(model), dk.UserMask(mask=mask))
        assert tuner.budget == 321
        assert {n: t.indices.tolist() for n, t in tuner.delta().tensors.items()} == expected
    assert _delta(model, dk.UserMask(mask=wanted, budget=321)).nnz == 321


def test_user_masks_name_what_is_wrong() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 3)})
    right = torch.zeros(3, 4, dtype=torch.bool)
    right[0, 0] = True

    def start(mask: Any, **options: Any) -> None:
        budget = options.pop("budget", None)
        dk.SparseTuner(model, dk.UserMask(mask=mask, budget=budget), **options)

    with pytest.raises(BudgetError, match="the mask makes 1 entries, expected 2"):
        start({"a.weight": right}, budget=2)
    with pytest.raises(BudgetError, match="the mask makes 0 entries, expected at least one"):
        start({"a.weight": ~right & False})
    with pytest.raises(CoordinateError, match=r"'a.wait', which is no target of this run; nearest"):
        start({"a.wait": right})
    with pytest.raises(CoordinateError, match="which is no target"):
        start({"a.weight": right}, target="a.bias")
    with pytest.raises(CoordinateError, match=r"mask has shape \[4, 3\], the weights \[3, 4\]"):
        start({"a.weight": right.T})
    with pytest.raises(ConfigError, match="must be boolean or hold flat indices, found float32"):
        start({"a.weight": right.float()})
    with pytest.raises(ConfigError, match=r"must lie in 0..11, found 3 to 12"):
        start(lambda name, weight: [3, 12] if weight.ndim == 2 else None)
    with pytest.raises(ConfigError, match="repeats an index"):
        start({"a.weight": np.array([3, 3])})
    with pytest.raises(ConfigError, match="1 entries of the mask are taken already"):
        start({"a.weight": right}, avoid=[_delta(model, dk.UserMask(mask={"a.weight": right}))])


@pytest.mark.parametrize("name", ["bernoulli", "heads", "mask"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_only_chosen_entries_move(name: str, kind: str) -> None:
    """Of masks that need a budget, model or mask of their own; `test_tuner` trains the others."""
    model = {"gpt2": _gpt2, "llama": _llama}[kind]().eval()
    method: Any = {
        "bernoulli": dk.BernoulliMask(probability=0.3),
        "heads": dk.HeadMask(budget=150),
        "mask": dk.UserMask(
            mask=lambda n, w: w.abs() > 0.02 if "mlp" in n and w.ndim > 1 else None
        ),
    }[name]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuner = dk.SparseTuner(model, method, lr=1e-2)
    for step in range(3):
        tokens = torch.arange(step, step + 8).reshape(1, 8)
        model(input_ids=tokens, labels=tokens).loss.backward()
        tuner.step()
    delta = tuner.delta()
    assert delta.nnz == tuner.budget == tuner.unmasked > 100
    moved = 0
    for parameter, weight in model.named_parameters():
        changed = (weight != before[parameter]).flatten().nonzero().flatten().tolist()
        moved += len(changed)
        tensor = delta.tensors.get(parameter)
        assert set(changed) <= set([] if tensor is None else tensor.indices.tolist())
    assert moved > delta.nnz / 5


@pytest.mark.parametrize("name", [*EXACT, "mask"])
def test_masks_have_no_budget_checkpoints(name: str) -> None:
    model = _net()
    method = EXACT[name](budget=50) if name in EXACT else None
    method = method or dk.UserMask(mask=_delta(model, dk.RandomMask(budget=50)))
    with pytest.raises(BudgetError, match="budget checkpoints; truncate"):
        dk.SparseTuner(model, method, budget_checkpoints=[20])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dk.RowMask(budget=0), "at least 1"),
        (lambda: dk.ColumnMask(budget=5, order="middle"), "unknown order 'middle'"),
        (lambda: dk.BlockMask(budget=5, block_size=0), "block_size must be at least 1"),
        (lambda: dk.NMMask(budget=5, n=5, m=4), "1 <= n <= m, found 5:4"),
        (lambda: dk.NMMask(budget=5, pick="best"), "unknown pick 'best'"),
    ],
)
def test_what_is_no_mask_is_refused(make: Callable[[], Method], message: str) -> None:
    with pytest.raises((BudgetError, ConfigError), match=message):
        make()


def test_settings_reach_the_masks(tmp_path: Path) -> None:
    """By their names on the command line; a mask's own seed wins over the run's."""
    needed = {"model": "m", "data": "d", "task": "causal-lm", "budget": 40, "output_dir": "o"}

    def made(**settings: Any) -> Method:
        config = resolve({}, {**needed, **settings})
        return make_method(config.method, 40, config.method_settings())

    assert made(method="rows", order="last", seed=3) == dk.RowMask(budget=40, order="last", seed=3)
    assert made(method="blocks", block_size="8") == dk.BlockMask(budget=40, block_size=8)
    chosen = made(method="n:m", n=1, m=8, pick="largest", seed=3, mask_seed=5)
    assert chosen == dk.NMMask(budget=40, n=1, m=8, pick="largest", seed=5)
    given = str(tmp_path / "a.sdelta")
    dk.save(_delta(_net(), dk.RandomMask(budget=7)), given)
    user = made(method="mask", mask=given)
    assert isinstance(user, dk.UserMask)
    assert user.budget == 40
    assert isinstance(user.mask, dk.SparseDelta)  # read here, before any model is
    assert user.mask.nnz == 7
    with pytest.raises(ConfigError, match="block_size does not apply to method rows"):
        made(method="rows", block_size=8)
    with pytest.raises(ConfigError, match="mask_seed does not apply to method mask"):
        made(method="mask", mask=given, mask_seed=8)
    with pytest.raises(ConfigError, match="method mask needs setting mask; give --mask"):
        made(method="mask")
    allocations = ["uniform", "attention=0.5,mlp=0.5", {"attention": 0.5, "mlp": 0.5}]
    for allocation in allocations:
        assert made(method="static", allocation=allocation).allocation == allocation  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"shares must sum to 1, found 0\.7"):
        made(method="static", allocation="attention=0.5,mlp=0.2")
