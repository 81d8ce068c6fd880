"""Gradients on a fixed support: those of the dense product, entry for entry, and nothing else."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import deltakit as dk
from deltakit.training import sampled, transposes
from deltakit.training.engine import Engine
from deltakit.training.entries import Entries
from deltakit.training.fixed_support import FixedSupport
from deltakit.training.gradient_path import GradientPath, embedding_path, product_path
from deltakit.training.target import Target

PATHS: list[GradientPath] = ["sampled", "submatrix"]


class Net(nn.Module):
    """An embedding tied to a functional decoder, both layer kinds, an in-place activation."""

    def __init__(self, *, checkpointed: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 16, padding_idx=2)
        self.up = nn.Linear(16, 40)
        self.down = Conv1D(16, 40)
        self.twice = nn.Linear(16, 16, bias=False)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        nn.init.normal_(self.down.weight, std=0.2)
        self.reentrant = checkpointed

    def block(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.down(self.up(hidden).relu_())
        hidden = torch.tanh(self.twice(torch.tanh(self.twice(hidden))))
        out: torch.Tensor = self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return out

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        if self.reentrant is None:
            hidden = self.block(hidden)
        else:
            hidden = checkpoint(self.block, hidden, use_reentrant=self.reentrant)
        return hidden @ self.embed.weight.to(hidden.dtype).t()


TOKENS = torch.tensor([[1, 2, 3, 3, 29], [0, 7, 7, 2, 11], [5, 4, 3, 2, 1]])
PATTERNS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "scattered": lambda h, w: torch.randperm(h * w)[: h * w // 5],
    "rows": lambda h, w: torch.arange(2 * w, 5 * w).flip(0),
    "columns": lambda h, w: torch.arange(h * w).view(h, w)[:, 3:6].reshape(-1),
    "block": lambda h, w: torch.arange(h * w).view(h, w)[1:4, 2:5].reshape(-1),
    "one": lambda h, w: torch.tensor([h * w - 1]),
}


def _engine(model: nn.Module, pattern: str = "scattered") -> Engine:
    """Entries of the pattern in every matrix; a few in every vector; in no particular order."""
    torch.manual_seed(1)
    targets = [Target(i, n, n, p) for i, (n, p) in enumerate(model.named_parameters())]
    chosen = [
        PATTERNS[pattern](*t.parameter.shape) if t.parameter.ndim == 2 else torch.tensor([3, 1])
        for t in targets
    ]
    entries = Entries(targets, sum(len(c) for c in chosen))
    for target, indices in zip(targets, chosen, strict=True):
        entries.add(target, indices, 0)
    return Engine(entries, [], None, model=model)


def _tap(engine: Engine, model: nn.Module, path: GradientPath) -> None:
    """Whatever it costs, so that tiny layers take the path as well."""
    if engine._fixed:
        engine._fixed.close()
    engine._fixed = FixedSupport(model, engine.entries, lambda _layer, _target: path)


def _loss(out: torch.Tensor) -> torch.Tensor:
    return out.double().square().mean() + out.double()[:, 0].sum()


def _compare(engine: Engine, dense: nn.Module, **tolerances: float) -> None:
    live = dict(dense.named_parameters())
    for target in engine.entries.targets:
        gradient = live[target.live_name].grad
        assert gradient is not None
        wanted = gradient.reshape(-1)[target.indices].to(engine.entries.base)
        found = engine.entries.gradient[target.slots]
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found, wanted, **tolerances)


@pytest.fixture(params=[True, False], ids=["sampled_addmm", "gathered"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch's kernel, and the portable one, in chunks that do not divide anything."""
    if not request.param:
        monkeypatch.setattr(sampled, "_has_sampled_addmm", lambda _device, _dtype: False)
        monkeypatch.setattr(sampled, "BUFFER", 100)
        monkeypatch.setattr(transposes, "BUFFER", 100)
        monkeypatch.setattr(transposes, "TILE", 2)
    yield


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("checkpointed", [None, False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("path", PATHS)
def test_entries_have_the_dense_gradient(
    path: GradientPath, pattern: str, checkpointed: bool | None
) -> None:
    """Layers called twice, tied and functional uses, two backward passes, any order of entries."""
    dense = Net(checkpointed=checkpointed).double()
    model = deepcopy(dense)
    engine = _engine(model, pattern)
    _tap(engine, model, path)
    assert engine.paths["attention.out_proj.weight"] == "dense"
    assert engine.paths["twice.weight"] == engine.paths["embed.weight"] == path
    assert engine.paths["up.bias"] == ("dense" if path == "dense" else "sampled")
    assert engine.paths["down.bias"] == "dense"  # an eighth of it: summing all is cheaper
    for tokens in (TOKENS, TOKENS[:, :2]):
        out = model(tokens)
        expected = dense(tokens)
        assert torch.equal(out, expected)
        _loss(out).backward()
        _loss(expected).backward()
    assert all(p.grad is None for p in model.parameters())
    _compare(engine, dense, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.float16, False),
    ],
)
def test_narrow_dtypes_and_autocast(path: GradientPath, dtype: torch.dtype, autocast: bool) -> None:
    """Forward bits are torch's own; sums are float32, so only the dense reference rounds."""
    dense = Net().to(dtype)
    model = deepcopy(dense)
    engine = _engine(model)
    _tap(engine, model, path)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, expected = model(TOKENS), dense(TOKENS)
    assert torch.equal(out, expected)
    _loss(out).backward()
    _loss(expected).backward()
    exact = dtype == torch.float32 and not autocast
    _compare(engine, dense, rtol=1e-5 if exact else 0.02, atol=1e-6 if exact else 0.03)


compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@compiles
@pytest.mark.parametrize("path", PATHS)
def test_a_compiled_model_is_one_graph_and_notices_that_selection_resumes(
    path: GradientPath,
) -> None:
    """Otherwise a selecting step would see no dense gradients."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = nn.Embedding(30, 16), nn.Linear(16, 24), nn.ReLU(inplace=True), Conv1D(16, 24)
    dense = nn.Sequential(*layers).double()
    model = deepcopy(dense)
    engine = _engine(model)
    _tap(engine, model, path)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    _loss(compiled(TOKENS)).backward()
    _loss(dense(TOKENS)).backward()
    _compare(engine, dense, rtol=1e-12, atol=1e-13)
    engine.close()
    engine.clear_gradients()
    _loss(compiled(TOKENS)).backward()
    assert engine.entries.gradient.count_nonzero() == 0
    for mine, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@settings(max_examples=60, deadline=None)
@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    features=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    density=st.floats(0.01, 1.0),
    left=st.booleans(),
    gathered=st.booleans(),
    seed=st.integers(0, 99),
)
def test_products_of_any_shape(
    leading: list[int],
    features: tuple[int, int],
    density: float,
    left: bool,
    gathered: bool,
    seed: int,
) -> None:
    """Against the dense product in float64, strided gradients and empty batches included."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, features[0], generator=generator, dtype=torch.float64)
    y = torch.randn(features[1], *leading, generator=generator, dtype=torch.float64)
    y = y.movedim(0, -1)
    full = x.reshape(-1, features[0]).t() @ y.reshape(-1, features[1])
    full = full if left else full.t()
    mask = torch.rand(full.shape, generator=generator) < density
    mask.view(-1)[0] = True
    starts = torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int()
    columns = mask.nonzero()[:, 1].int()
    if gathered:
        turned = [
            next(iter(transposes.transposed(t.reshape(-1, t.shape[-1]), 64, t.dtype)), None)
            for t in ((x, y) if left else (y, x))
        ]
        if turned[0] is None or turned[1] is None:
            return
        found = sampled._gathered_block(turned[0], turned[1], starts, columns)
    else:
        found = sampled.sampled_product(x, y, starts, columns, activations_left=left)
    torch.testing.assert_close(found, full[mask], rtol=1e-12, atol=1e-12)


def test_registered_operators_follow_the_rules() -> None:
    """Schema, fake implementation and aliasing, by torch's own checker."""
    x, y = torch.randn(5, 4), torch.randn(5, 3).bfloat16()
    starts, columns = torch.tensor([0, 1, 1, 2], dtype=torch.int32), torch.tensor([3, 0]).int()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.deltakit.sampled_product,
        (x, y, starts, columns),
        {"activations_left": False},
        test_utils=checks,
    )
    arguments = (torch.tensor([0, 2, 2, 1, 0]), x, starts, columns, 1, 1)
    torch.library.opcheck(torch.ops.deltakit.sampled_embedding, arguments, test_utils=checks)


def test_infinities_reach_only_their_own_entries() -> None:
    """A broken token must be seen, and no stale memory may be taken for one."""
    x, y = torch.ones(3, 2), torch.ones(3, 2)
    x[1, 0] = float("nan")
    starts, columns = torch.tensor([0, 2, 2]).int(), torch.tensor([0, 1]).int()
    found = sampled.sampled_product(x, y, starts, columns, activations_left=False)
    assert found.isnan().tolist() == [True, False] and found[1] == 3


def test_shared_activations_are_transposed_once_and_never_stale() -> None:
    x, y = torch.randn(6, 4), torch.randn(6, 4)

    def check(x: torch.Tensor) -> None:
        starts, columns = torch.arange(5).int(), torch.arange(4).int()
        diagonal = sampled.sampled_product(x, y, starts, columns, activations_left=False)
        torch.testing.assert_close(diagonal, (x * y).sum(0))

    check(x)
    kept = transposes._last
    check(x)
    assert transposes._last is kept is not None
    x.mul_(2)  # in place: the same tensor, another version
    check(x)
    check(x.clone())
    check(x)
    del x
    assert transposes._last is None


class _Sizes(TorchDispatchMode):
    """The largest number of elements that any operation has returned in memory of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else [out]:
            strided = isinstance(part, torch.Tensor) and part.layout == torch.strided
            if strided and part.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, part.numel())
        return out


def test_nothing_dense_is_allocated() -> None:
    """By the paths that the cost model itself picks, in backward and in the optimizer's step."""
    model = nn.Sequential(nn.Embedding(3000, 256), nn.Linear(256, 512), Conv1D(300, 512))
    tuner = dk.SparseTuner(model, dk.RandomMask(budget=400), target="*.weight")
    assert set(tuner.gradient_paths.values()) == {"sampled", "submatrix"}
    loss = model(torch.arange(12).view(3, 4)).square().sum()
    with _Sizes(model) as sizes:
        loss.backward()
        tuner.step()
    assert 0 < sizes.largest < 256 * 512 / 2
    tuner.engine.close()
    loss = model(torch.arange(12).view(3, 4)).square().sum()
    with _Sizes(model) as sizes:
        loss.backward()
    assert sizes.largest >= 3000 * 256


def test_a_layer_without_entries_keeps_nothing() -> None:
    """Neither its input for backward, nor a gradient."""
    model = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 5))
    dk.SparseTuner(model, dk.RandomMask(budget=5), target="0.weight")
    kept: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(7, 300))
    assert (7, 300) in kept and (7, 400) not in kept


def test_closing_leaves_the_model_as_it_was() -> None:
    """And copies made meanwhile are plain models that learn densely."""
    model = Net()
    attributes = [set(vars(module)) for module in model.modules()]
    names = list(model.state_dict())
    engine = _engine(model)
    _tap(engine, model, "sampled")
    assert list(model.state_dict()) == names and "forward" in vars(model.up)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for copy in (deepcopy(model), torch.load(stream, weights_only=False)):
        out = copy(TOKENS)
        assert torch.equal(out, model(TOKENS))
        _loss(out).backward()
        assert all(p.grad is not None for p in copy.parameters())
    assert engine.entries.gradient.count_nonzero() == 0
    calls: list[int] = []
    model.up.register_forward_hook(lambda *_: calls.append(1))
    model(TOKENS)
    assert calls == [1]
    engine.close()
    assert [set(vars(module)) for module in model.modules()] == attributes
    _loss(model(TOKENS)).backward()
    assert engine.entries.gradient.count_nonzero() == 0


def test_subclasses_and_special_embeddings_stay_dense() -> None:
    """What they do with their weight is not known here."""

    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return nn.functional.linear(input, 2 * self.weight)

    model = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), Scaled(4, 5), nn.Linear(5, 5))
    patched = nn.Linear.forward.__get__(model[2])
    model[2].forward = patched
    engine = _engine(model)
    _tap(engine, model, "sampled")
    assert set(engine.paths.values()) == {"dense"}
    engine.close()
    assert model[2].forward is patched


@pytest.mark.parametrize("tied", [False, True])
def test_training_resumes_bit_for_bit_on_sampled_paths(tied: bool) -> None:
    """Also when the support settles only after some steps of selection."""

    def make() -> tuple[nn.Module, dk.SparseTuner]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(500, 320), nn.Linear(320, 320), nn.Linear(320, 500))
        if tied:
            model[2].weight = model[0].weight
        return model, dk.SparseTuner(model, dk.ID3(budget=300, steps=2), lr=1e-2)

    def train(model: nn.Module, tuner: dk.SparseTuner, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            model(torch.randint(0, 500, (4, 6), generator=generator)).square().mean().backward()
            tuner.step()

    straight, tuner = make()
    train(straight, tuner, range(2))
    assert set(tuner.gradient_paths.values()) - {"dense"}
    train(straight, tuner, range(2, 4))
    state = deepcopy(tuner.state_dict())
    train(straight, tuner, range(4, 7))
    resumed, again = make()
    assert set(again.gradient_paths.values()) <= {"dense"}
    again.load_state_dict(state)
    assert again.gradient_paths == tuner.gradient_paths
    train(resumed, again, range(4, 7))
    assert all(map(torch.equal, straight.parameters(), resumed.parameters()))
    assert tuner.delta().equals(again.delta())


def test_the_cheapest_path() -> None:
    """The crossovers that were measured, and structured masks by their rows and columns."""
    layer = (4096, 4096)
    everywhere = {"rows": 4096, "columns": 4096}
    for bits, crossover in ((32, 0.10), (16, 0.027)):
        below, above = (round(4096**2 * crossover * f) for f in (0.9, 1.1))
        assert product_path(layer, below, **everywhere, bits=bits) == "sampled"
        assert product_path(layer, above, **everywhere, bits=bits) == "dense"
    assert product_path(layer, 100 * 4096, 4096, 100, bits=32) == "submatrix"
    assert product_path(layer, 100 * 4096, 100, 4096, bits=16) == "submatrix"
    assert product_path(layer, 64 * 64, 64, 64, bits=32) == "submatrix"
    assert product_path((64, 64), 1, 1, 1, bits=32) == "dense"
    assert embedding_path((30_000, 384), 50_000) == "sampled"
    assert embedding_path((2, 384), 3) == "dense"
    assert embedding_path((30_000, 384), 30_000 * 384) == "dense"
