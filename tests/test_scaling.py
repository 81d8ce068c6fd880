"""docs/scaling.md's arithmetic: known sizes, laws, and what deltakit really holds and writes."""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deltakit as dk
from deltakit.formats import sdelta
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.seeded import seeded_support
from deltakit.identity import SAMPLES

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
shapes: Any = import_module("scaling_shapes")
cost: Any = import_module("scaling_arithmetic")
tables: Any = import_module("scaling_tables")
simulator: Any = import_module("scaling_simulate")
measured: Any = import_module("scaling_memory")

TINY = {"layers": 2, "hidden": 64, "inner": 160, "heads": 4, "kv_heads": 2, "vocabulary": 320}
DENSITIES = (0.0001, 0.001, 0.01)


def tiny(**other: int) -> torch.nn.Module:
    """A live model of the tiny shape, or with other numbers."""
    model: torch.nn.Module = measured.live({**TINY, **other})
    return model


def test_the_tables_of_the_page_are_the_arithmetic_s() -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    assert page == tables.filled(page), "run: python benchmarks/scaling.py table --write"


@pytest.mark.parametrize(
    ("size", "weights"),
    [("8B", 8_030_261_248), ("70B", 70_553_706_496), ("405B", 405_853_388_800)],
)
def test_the_sizes_of_llama_3_1_are_those_of_its_published_checkpoints(
    size: str, weights: int
) -> None:
    model = shapes.MODELS[size]
    assert model.weights == weights == sum(map(prod, model.tensors.values()))


def test_the_mixture_s_shapes_give_the_published_size_of_deepseek_v3() -> None:
    numbers = {"layers": 61, "dense_layers": 3, "hidden": 7168, "inner": 18_432, "experts": 256}
    numbers |= {"shared": 1, "expert_inner": 2048, "heads": 128, "q_rank": 1536, "kv_rank": 512}
    numbers |= {"nope": 128, "rope": 64, "value": 128, "vocabulary": 129_280}
    assert shapes.mixture("V3", **numbers).weights == 671_026_419_200


def test_names_and_shapes_are_those_of_the_live_model() -> None:
    live = {name: tuple(tensor.shape) for name, tensor in tiny().state_dict().items()}
    assert shapes.llama("", **TINY).tensors == live


@pytest.mark.parametrize("name", tables.METHODS)
def test_memory_is_the_sum_of_its_terms_and_falls_with_ranks_only_where_sharded(name: str) -> None:
    model = shapes.MODELS["70B"]
    parallel, sharded = tables.METHODS[name]
    found = [sharded(model, n) for n in (2, 8, 64)]
    for memory in (parallel(model, 2), *found):
        parts = sum(memory.backward.values()), sum(memory.update.values())
        assert memory.peak == sum(memory.held.values()) + max(parts)
        assert all(term >= 0 for part in (memory.held, memory.backward) for term in part.values())
    assert found[0].peak > found[1].peak > found[2].peak
    assert parallel(model, 2).peak == parallel(model, 64).peak > found[0].held["weights"]


@pytest.mark.parametrize(
    "method",
    [cost.fixed_parallel, cost.selecting_parallel, cost.fixed_sharded, cost.selecting_sharded],
)
def test_memory_grows_with_entries(method: Any) -> None:
    few, many = (method(shapes.MODELS["8B"], 8, k).peak for k in (10**6, 10**8))
    assert few < many < few + 10**8 * (cost.ENTRY + cost.TAP + cost.UPDATE)


def tensor_bytes() -> dict[int, int]:
    """Every storage that some tensor uses: its address -> its bytes."""
    gc.collect()
    alive = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    storages = [each.untyped_storage() for each in alive if each.layout is torch.strided]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def test_training_holds_the_bytes_per_entry_that_the_arithmetic_says() -> None:
    model, tokens = tiny(hidden=256, inner=640), torch.arange(12)[None]
    targets = {name: p.shape[0] for name, p in model.named_parameters() if "mlp" in name}
    before, k = tensor_bytes(), 9000
    tuner = dk.SparseTuner(model, dk.RandomMask(budget=k), target=[*targets])
    assert set(tuner.gradient_paths.values()) == {"sampled"}
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        tuner.step()
    after = tensor_bytes()
    held = sum(size for place, size in after.items() if place not in before)
    starts, samples = sum(targets.values()) + len(targets), SAMPLES * len(targets)
    assert held == pytest.approx((cost.ENTRY + cost.TAP) * k + 4 * (starts + samples), rel=0.01)


def test_the_state_of_training_has_the_bytes_per_entry_that_the_arithmetic_says() -> None:
    model, tokens, k = tiny(), torch.arange(12)[None], 6000
    tuner = dk.SparseTuner(model, dk.RandomMask(budget=k))
    model(input_ids=tokens, labels=tokens).loss.backward()
    tuner.step()

    def size(part: Any) -> int:
        if isinstance(part, torch.Tensor):
            return part.nbytes
        parts = part.values() if isinstance(part, dict) else part
        return sum(map(size, parts)) if isinstance(part, (dict, list, tuple)) else 0

    assert size(tuner.state_dict()) == cost.checkpoint_bytes(k)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("value", ["float32", "bfloat16"])
@pytest.mark.parametrize("seeded", [False, True])
def test_files_have_the_size_that_the_arithmetic_says(
    density: float, value: str, seeded: bool, tmp_path: Path
) -> None:
    shape, tensors, rng = (1500, 2000), {}, np.random.default_rng(0)
    count = round(density * prod(shape))
    for name in "abc":
        tensors[name] = dk.TensorDelta(
            name=name,
            shape=shape,
            dtype="bfloat16",
            mode="add",
            indices=seeded_support(1, name, prod(shape), count),
            values=rng.standard_normal(count).astype(np.float32),
            seed=1 if seeded else None,
        )
    delta, k = dk.SparseDelta(tensors=tensors), 3 * count
    path = tmp_path / "delta.sdelta"
    sdelta.save(delta, path, values=value)
    itemsize = 4 if value == "float32" else 2
    told = cost.delta_bytes(k, density, 0, value=itemsize, seeded=seeded)
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert path.stat().st_size - header == pytest.approx(told, rel=0.02)
    assert cost.entropy_bits(density) < cost.rice_bits(density) < 1.01 * cost.entropy_bits(density)


def test_headers_have_about_the_size_that_the_arithmetic_says(tmp_path: Path) -> None:
    base, path = tmp_path / "base", tmp_path / "delta.sdelta"
    simulator.write_model(base, shapes.llama("", **{**TINY, "layers": 40}))
    delta = simulator.write_delta(path, base, 40_000)
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert header / len(delta.tensors) == pytest.approx(cost.HEADER, rel=0.2)


@pytest.mark.parametrize("density", DENSITIES)
def test_pages_with_entries_are_counted(density: float) -> None:
    numel = 2**23
    k, rng = round(density * numel), np.random.default_rng(0)
    touched = len(np.unique(rng.choice(numel, k, replace=False) * 2 // cost.PAGE))
    told = cost.pages_with_entries(2 * numel, density) / cost.PAGE
    assert touched == pytest.approx(told, rel=0.05)


def test_a_fixed_support_exchanges_entries_and_a_ring_is_counted_per_rank() -> None:
    model = shapes.MODELS["8B"]
    two, many = (cost.sent_per_step(model, n, 10**6) for n in (2, 1000))
    assert two["fixed support, data parallel"] == 4 * 10**6
    assert many["fixed support, data parallel"] == pytest.approx(8 * 10**6, rel=0.01)
    assert two["full, data parallel"] == 4 * model.weights
    assert cost.candidates_sent(model, 8) < two["selecting, data parallel"]


def test_the_simulator_s_checkpoint_is_whole_and_takes_up_no_disk(tmp_path: Path) -> None:
    model = shapes.MODELS["8B"]
    simulator.write_model(tmp_path / "base", model)
    found = Checkpoint(tmp_path / "base")
    assert {name: info.shape for name, info in found.tensors.items()} == model.tensors
    assert found.total_weights == model.weights
    files = [path.stat() for path in (tmp_path / "base").glob("*.safetensors")]
    assert sum(each.st_size for each in files) > 16e9
    if hasattr(files[0], "st_blocks"):
        assert 512 * sum(each.st_blocks for each in files) < 10e6
