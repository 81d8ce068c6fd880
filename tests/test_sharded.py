"""Models that FSDP2 has split train what one process would with the same rows, each its own part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sharded_runs
import torch
from parallel_lab import together
from parallel_runs import Trained
from sharded_runs import STEPS, Stacked, drawn, train
from tiny_models import write_gpt2, write_llama
from transformers import AutoModelForCausalLM

import deltakit as dk

CASES: list[tuple[str, dict[str, Any]]] = [
    ("random", {"paths": "sampled"}),
    ("random", {"paths": "submatrix", "passes": 2}),
    ("id3", {"passes": 2}),
    ("id3", {"paths": "sampled", "optimizer": "sgd"}),
    ("id3 factored", {"paths": "submatrix"}),
    ("magnitude", {}),
    ("once", {"paths": "sampled"}),
    ("id3 factored", {"dtype": "float32"}),
    ("id3", {"dtype": "bfloat16"}),
]


HALVES = [("id3", "adamw"), ("id3", "sgd"), ("random", "adam")]
SIZES = (2, 3)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Per number of processes, what its ranks have made of CASES, and the states of HALVES."""
    found: dict[int, Any] = {}
    for size in SIZES:
        folder = tmp_path_factory.mktemp("shards") / "meeting"
        ranks = together(size, folder, sharded_runs.begin, CASES, HALVES)
        runs, states = zip(*ranks, strict=True)
        found[size] = list(zip(*runs, strict=True)), [list(s) for s in zip(*states, strict=True)]
    return found


@pytest.fixture(scope="module", params=SIZES)
def runs(request: pytest.FixtureRequest, begun: dict[int, Any]) -> Any:
    """Per case, what each rank has trained."""
    return begun[request.param][0]


def test_every_rank_has_the_same_file(runs: list[tuple[Trained, ...]]) -> None:
    for case, ranks in zip(CASES, runs, strict=True):
        assert all(rank.file == ranks[0].file for rank in ranks), case
        assert sum(map(len, ranks[0].indices.values())) == 60, case


def test_float64_runs_equal_one_process(runs: list[tuple[Trained, ...]]) -> None:
    compared = 0
    for (name, options), ranks in zip(CASES, runs, strict=True):
        if "dtype" not in options:
            assert_same(ranks[0], train(name, **options))
            compared += 1
    assert compared == 7


def assert_same(found: Trained, expected: Trained) -> None:
    """Equal supports, and values but for the order of sums."""
    assert list(found.indices) == list(expected.indices)
    for tensor, indices in expected.indices.items():
        np.testing.assert_array_equal(found.indices[tensor], indices, tensor)
        np.testing.assert_allclose(
            found.values[tensor], expected.values[tensor], rtol=1e-6, atol=1e-8
        )
    for extra, values in expected.extras.items():
        np.testing.assert_allclose(found.extras[extra], values, rtol=1e-6, atol=1e-8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the laws' ranks leave files; `first` is a delta to continue from."""
    folder = tmp_path_factory.mktemp("files")
    dk.save(sharded_runs.run("id3", steps=2).delta(), folder / "first")
    write_llama(folder / "llama")
    write_gpt2(folder / "gpt2")
    return folder


@pytest.fixture(scope="module")
def laws(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three ranks found in `sharded_runs.laws`."""
    meeting = tmp_path_factory.mktemp("laws") / "meeting"
    return together(3, meeting, sharded_runs.laws, folder)


def test_a_rank_holds_entries_and_state_of_its_own_rows_alone(laws: list[dict[str, Any]]) -> None:
    held = [rank["held"] for rank in laws]
    assert sum(rank["count"] for rank in held) == 60
    assert all(0 < rank["count"] <= rank["places"] < 60 for rank in held)
    assert all(rank["state"] == [(rank["places"],)] * 2 for rank in held)
    assert [rank["unmasked"] for rank in held] == [60] * 3
    total = [parameter.shape[0] for parameter in Stacked(torch.float64).parameters()]
    assert [sum(rows) for rows in zip(*(rank["rows"] for rank in held), strict=True)] == total
    assert any(0 in rank["rows"] for rank in held)  # the laws hold where a rank has nothing, too


def test_only_chosen_entries_move(laws: list[dict[str, Any]]) -> None:
    for rank in laws:
        assert rank["held"]["stray"]
        assert not any(rank["held"]["stray"].values())


def test_the_first_rank_writes_what_all_can_have(laws: list[dict[str, Any]], folder: Path) -> None:
    saved = (folder / "saved").read_bytes()
    assert all((folder / f"delta-{rank}").read_bytes() == saved for rank in range(len(laws)))


def test_a_fixed_support_adds_up_its_entries_and_nothing_else(laws: list[dict[str, Any]]) -> None:
    for rank in laws:
        random, id3 = rank["exchanged"]
        tapped = sum(len(t.indices) for n, t in fixed().items() if "norm" not in n)
        assert random == [[tapped + 1, 1]] * STEPS  # and a wish to stop; the norm
        bins = 256
        assert id3[:4] == [[1, bins, bins, bins, bins, 1]] * 4  # what the threshold takes
        assert all(len(step) == 2 and step[0] < 62 for step in id3[4:])


def fixed() -> dict[str, Any]:
    return dict(sharded_runs.run("random", steps=0).delta().tensors)


def test_the_best_of_all_are_those_of_one_list(laws: list[dict[str, Any]]) -> None:
    for round_, (everyone, wanted) in enumerate(drawn(3)):
        expected = sorted(everyone[2][:wanted].tolist())
        found = [number for rank in laws for number in rank["best"][round_][0]]
        assert sorted(found) == expected
        assert {rank["best"][round_][1] for rank in laws} == {max(0, wanted - 60)}


def test_the_budget_is_met_where_too_few_have_a_gradient(laws: list[dict[str, Any]]) -> None:
    alone = sharded_runs.run_without_gradients()
    assert sum(map(len, alone.indices.values())) == 200
    for rank in laws:
        assert_same(rank["zeros"], alone)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_is_loaded_once_and_its_delta_merges_to_the_live_bits(
    name: str, laws: list[dict[str, Any]], folder: Path
) -> None:
    """The delta is in the checkpoint's own coordinates, which for GPT-2 are turned."""
    for rank in laws:
        assert rank["pretrained"][name]["same"] and rank["pretrained"][name]["split"]
    delta = folder / name / "delta.sdelta"
    assert dk.load(delta).nnz == 90
    dk.merge(folder / name, delta, folder / f"{name}-merged")
    merged = AutoModelForCausalLM.from_pretrained(folder / f"{name}-merged")
    live = laws[0]["pretrained"][name]["weights"]
    for parameter, weight in merged.named_parameters():
        assert torch.equal(weight, live[parameter]), parameter


def test_a_delta_is_continued(laws: list[dict[str, Any]], folder: Path) -> None:
    first = dk.load(folder / "first")
    alone = dk.load(folder / "first")
    expected = sharded_runs.trained(sharded_runs.run("random", steps=2, init_delta=alone).delta())
    for rank in laws:
        assert_same(rank["continued"], expected)
    for name, tensor in first.tensors.items():
        assert set(tensor.indices) <= set(laws[0]["continued"].indices[name])


def test_what_cannot_be_is_told_in_one_line(laws: list[dict[str, Any]]) -> None:
    expected = {
        "columns": "tensor parallelism and hybrid sharding are not supported",
        "part": "is not sharded while others are; expected fully_shard over all 3 processes",
        "repeat": "moves entries between processes and does not train sharded models; use ID3",
        "drop-and-grow": "moves entries between processes",
        "fish": "looks at gradients before it chooses, which it cannot of a sharded model",
        "apart": "rank 1 starts from other support than rank 0",
        "apply": "is split among processes (fully_shard); apply the delta before that",
    }
    for rank in laws:
        assert rank["refused"].keys() == expected.keys()
        for name, line in expected.items():
            assert line in rank["refused"][name]
            assert "\n" not in rank["refused"][name]


@pytest.mark.parametrize("size", [1, *SIZES])
def test_any_number_of_processes_takes_a_run_up(
    size: int, begun: dict[int, Any], tmp_path: Path
) -> None:
    """In as many as before, in others, or alone."""
    alone = [[state] for state in sharded_runs.halves(HALVES)]
    states = [begun[2][1], begun[3][1], *([alone] if size > 1 else [])]
    if size == 1:
        found = sharded_runs.second_halves(HALVES, states)
    else:
        found = together(size, tmp_path / "ranks", sharded_runs.second_halves, HALVES, states)[0]
    for left in found:
        for (name, optimizer), ended in zip(HALVES, left, strict=True):
            assert_same(ended, train(name, optimizer=optimizer))
