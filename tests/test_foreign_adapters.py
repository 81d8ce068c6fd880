"""SpIEL's and RoSA's adapters: models equal to what the peers' own merging makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_files import Attack, Entries, csr, dense, random_entries, rosa_layer, write_adapter
from safetensors.torch import load_file
from tiny_models import write_llama
from transformers import LlamaForCausalLM

import deltakit as dk
from deltakit.conversion import convert
from deltakit.errors import ConfigError, CoordinateError, DeltakitError, FormatError
from deltakit.formats.bridges import recognise

Q = "model.layers.0.self_attn.q_proj"
GATE = "model.layers.1.mlp.gate_proj"
SPIEL = {"peft_type": "SFT", "base_model_name_or_path": "org/base", "num_deltas": {Q: 9, GATE: 9}}
ROSA = {
    "peft_type": "ROSA",
    "base_model_name_or_path": "org/base",
    "r": 0,
    "lora_alpha": 8,
    "d": 0.1,
}
Model = tuple[Path, dict[str, torch.Tensor]]
PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


def base_of(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    """A decoder on disk in `dtype`, and its tensors."""
    write_llama(folder)
    LlamaForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    return folder, load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A float32 base on disk, and its tensors."""
    return base_of(tmp_path_factory.mktemp("model") / "base")


def entries_of(
    state: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, Entries]:
    shapes = {module: state[f"{module}.weight"].shape for module in (Q, GATE)}
    return {m: random_entries(s, 9, n, dtype) for n, (m, s) in enumerate(shapes.items())}


def spiel_tensors(entries: Mapping[str, Entries]) -> dict[str, torch.Tensor]:
    tensors = {}
    for module, (indices, values) in entries.items():
        tensors[f"{module}.sft_delta.values"] = values
        tensors[f"{module}.sft_delta.indices"] = indices.int()
    return tensors


def merged_bits(base: Path, out: Path, delta: Path) -> dict[str, torch.Tensor]:
    dk.merge(base, dk.load(delta), out)
    return load_file(out / "model.safetensors")


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
    return list(found) == list(expected) and all(
        torch.equal(found[n].view(bits[t.dtype]), t.view(bits[t.dtype]))
        for n, t in expected.items()
    )


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_spiel_merges_to_the_peers_bits(tmp_path: Path, dtype: torch.dtype, pickled: bool) -> None:
    """The peer: values cast to the weight's dtype, then added to it by scatter_reduce."""
    base, state = base_of(tmp_path / "base", dtype)
    entries = entries_of(state)
    source = write_adapter(tmp_path / "spiel", SPIEL, spiel_tensors(entries), pickled)
    for module, (indices, values) in entries.items():
        flat = state[f"{module}.weight"].view(-1)
        flat.scatter_reduce_(0, indices, values.to(dtype), "sum", include_self=True)

    report = convert(source, tmp_path / "out.sdelta", base=base)
    assert (report.from_format, report.entries) == ("spiel", 18)
    assert report.found.startswith("SpIEL adapter")
    assert any("rounded" in note for note in report.notes) == (dtype != torch.float32)
    assert same(merged_bits(base, tmp_path / "merged", tmp_path / "out.sdelta"), state)
    assert dk.load(tmp_path / "out.sdelta").base.model_id == "org/base"


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("values", [torch.bfloat16, torch.float32])
def test_rosa_merges_to_the_peers_bits(
    tmp_path: Path, dtype: torch.dtype, values: torch.dtype
) -> None:
    """The peer: weight += the dense form of the sparse matrix, in whatever dtype that is."""
    base, state = base_of(tmp_path / "base", dtype)
    entries = entries_of(state, values)
    tensors: dict[str, torch.Tensor] = {}
    for module, found in entries.items():
        weight = state[f"{module}.weight"]
        tensors |= rosa_layer(module, weight.shape, found)
        weight += dense(weight.shape, found)
    source = write_adapter(tmp_path / "rosa", ROSA, tensors)

    report = convert(source, tmp_path / "out.sdelta", base=base)
    assert (report.from_format, report.entries, report.notes) == ("rosa", 18, ())
    assert same(merged_bits(base, tmp_path / "merged", tmp_path / "out.sdelta"), state)


def with_factors(
    tensors: dict[str, torch.Tensor], state: Mapping[str, torch.Tensor], rank: int = 2
) -> dict[str, torch.Tensor]:
    """`tensors` with random factors of `rank` beside them, bfloat16."""
    generator = torch.Generator().manual_seed(5)
    for module in (Q, GATE):
        rows, columns = state[f"{module}.weight"].shape
        for part, shape in {"A": (rank, columns), "B": (rows, rank)}.items():
            factor = torch.randn(*shape, generator=generator).bfloat16()
            tensors[f"{module}.rosa_{part}.weight"] = factor
    return tensors


@pytest.mark.parametrize("rslora", [False, True])
def test_rosas_low_rank_part_becomes_the_largest_entries_of_the_sum(
    tmp_path: Path, model: Model, rslora: bool
) -> None:
    base, state = model
    entries = entries_of(state, torch.bfloat16)
    tensors: dict[str, torch.Tensor] = {}
    changes = {}
    for module, found in entries.items():
        tensors |= rosa_layer(module, state[f"{module}.weight"].shape, found)
    tensors = with_factors(tensors, state)
    scaling = 8 / 2**0.5 if rslora else 8 / 2
    for module, found in entries.items():
        a, b = (tensors[f"{module}.rosa_{part}.weight"].float().numpy() for part in "AB")
        sparse = dense(state[f"{module}.weight"].shape, found).float().numpy()
        changes[f"{module}.weight"] = sparse + np.float32(scaling) * (b @ a)
    config = ROSA | {"r": 2, "use_rslora": rslora}
    source = write_adapter(tmp_path / "rosa", config, tensors)

    with pytest.raises(ConfigError, match="low-rank part beside the sparse one"):
        convert(source, tmp_path / "out.sdelta", base=base)
    report = convert(source, tmp_path / "out.sdelta", base=base, budget=100)
    delta = dk.load(tmp_path / "out.sdelta")
    assert delta.nnz == 100
    assert 0 < report.retained < 1
    limit = np.sort(np.concatenate([np.abs(c).reshape(-1) for c in changes.values()]))[-100]
    for name, change in changes.items():
        expected = np.flatnonzero(np.abs(change) >= limit)
        assert delta.tensors[name].indices.tolist() == expected.tolist()
        found = delta.tensors[name].values
        assert found.tobytes() == change.reshape(-1)[expected].tobytes()

    report = convert(source, tmp_path / "sparse.sdelta", base=base, lossy=True)
    assert report.notes == ("the low-rank parts of 2 modules were left out",)
    assert dk.load(tmp_path / "sparse.sdelta").nnz == 18


def test_a_budget_is_for_low_rank_parts(tmp_path: Path, model: Model) -> None:
    base, state = model
    tensors = rosa_layer(Q, state[f"{Q}.weight"].shape, random_entries((16, 16), 5, 0))
    source = write_adapter(tmp_path / "rosa", ROSA, tensors)
    with pytest.raises(ConfigError, match="sparse as it is"):
        convert(source, tmp_path / "out.sdelta", base=base, budget=3)


def test_rosa_without_a_mask_has_no_sparse_part(tmp_path: Path, model: Model) -> None:
    """Before the mask is made all offsets are 0 and the values lie ready."""
    base, state = model
    shape = state[f"{Q}.weight"].shape
    tensors = rosa_layer(Q, shape, random_entries(shape, 5, 0))
    zeroed = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    source = write_adapter(tmp_path / "rosa", ROSA, with_factors(zeroed, state))
    convert(source, tmp_path / "out.sdelta", base=base, lossy=True)
    assert dk.load(tmp_path / "out.sdelta").nnz == 0


def test_modules_saved_whole_become_extras(tmp_path: Path, model: Model) -> None:
    base, state = model
    head = torch.randn_like(state["lm_head.weight"])
    tensors = spiel_tensors(entries_of(state)) | {
        "lm_head.weight": head,
        "score.weight": head[:2].clone(),
    }
    convert(write_adapter(tmp_path / "spiel", SPIEL, tensors), tmp_path / "out.sdelta", base=base)
    extras = dk.load(tmp_path / "out.sdelta").extras
    assert {name: array.tobytes() for name, array in extras.items()} == {
        "lm_head.weight": head.numpy().tobytes(),
        "score.weight": head[:2].numpy().tobytes(),
    }


def broken_spiel(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[dict[str, Any], str]]:
    indices, values = random_entries(state[f"{Q}.weight"].shape, 9, 0)
    v, i = f"{Q}.sft_delta.values", f"{Q}.sft_delta.indices"
    good = {v: values, i: indices.int()}
    return {
        "twice": (good | {i: torch.zeros(9, dtype=torch.int32)}, "index 0 stands twice"),
        "beyond": (good | {i: indices.int() + 256}, "out of range for shape"),
        "below": (good | {i: -indices.int() - 1}, "out of range for shape"),
        "short": (good | {i: indices.int()[:8]}, r"\[8\] and float32 \[9\]"),
        "square": (good | {i: indices.int().reshape(3, 3)}, r"\[3, 3\]"),
        "floats": (good | {i: indices.float()}, "expected integers"),
        "counts": (good | {v: indices.int()}, "values are int32, expected floats"),
        "nan": (good | {v: values * torch.nan}, "not finite"),
        "alone": ({v: values}, "sft_delta.values alone"),
        "elsewhere": (
            {"x.sft_delta.values": values, "x.sft_delta.indices": indices.int()},
            "has no",
        ),
    }


@pytest.mark.parametrize("fault", broken_spiel({f"{Q}.weight": torch.zeros(16, 16)}))
def test_spiel_files_that_do_not_add_up(tmp_path: Path, model: Model, fault: str) -> None:
    base, state = model
    tensors, message = broken_spiel(state)[fault]
    refuse(write_adapter(tmp_path / "spiel", SPIEL, tensors), base, message)


def refuse(source: Path, base: Path, message: str) -> None:
    out = source.parent / "out.sdelta"
    with pytest.raises(DeltakitError, match=message) as caught:
        convert(source, out, base=base)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def broken_rosa(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[dict[str, Any], str]]:
    shape = state[f"{Q}.weight"].shape
    good = rosa_layer(Q, shape, random_entries(shape, 9, 0))
    v, o, c = (f"{Q}.rosa_spa.{part}" for part in ("values", "row_offs", "col_idx"))
    offsets = good[o]
    return {
        "falling": (good | {o: offsets.flip(0)}, "must rise from 0 to the 9 columns"),
        "not from 0": (good | {o: offsets.clamp(min=1)}, "must rise from 0"),
        "too few": (
            good | {o: offsets.clamp(max=8)},
            "must rise from 0 to the 9 columns, found 0 to 8",
        ),
        "dips": (good | {o: torch.tensor([0, 9, 0, *[9] * 14]).int()}, "must rise from 0"),
        "rows": (good | {o: offsets[:-1]}, r"do not fit a matrix of shape \[16, 16\]"),
        "columns": (good | {c: good[c] + 16}, "outside shape"),
        "negative": (good | {c: -good[c] - 1}, "outside shape"),
        "twice": (good | {c: good[c] * 0, o: torch.tensor([0, *[9] * 16]).int()}, "stands twice"),
        "float": (good | {c: good[c].float()}, "expected integers"),
        "lacking": ({v: good[v], c: good[c]}, "a part of the sparse matrix is missing"),
        "one factor": (good | {f"{Q}.rosa_A.weight": torch.ones(2, 16)}, "no RoSA layer"),
        "factors": (
            good
            | {f"{Q}.rosa_A.weight": torch.ones(2, 16), f"{Q}.rosa_B.weight": torch.ones(16, 3)},
            "do not fit",
        ),
    }


@pytest.mark.parametrize("fault", broken_rosa({f"{Q}.weight": torch.zeros(16, 16)}))
def test_rosa_files_that_do_not_add_up(tmp_path: Path, model: Model, fault: str) -> None:
    base, state = model
    tensors, message = broken_rosa(state)[fault]
    refuse(write_adapter(tmp_path / "rosa", ROSA, tensors), base, message)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"fan_in_fan_out": True}, "wrong orientation"),
        ({"init_lora_weights": "loftq"}, "changes the base"),
    ],
)
def test_rosa_settings_that_cannot_be_converted(
    tmp_path: Path, model: Model, setting: dict[str, Any], message: str
) -> None:
    base, _ = model
    tensors = rosa_layer(Q, (16, 16), random_entries((16, 16), 9, 0))
    refuse(write_adapter(tmp_path / "rosa", ROSA | setting, tensors), base, message)


def test_columns_beyond_15_bits_are_unsigned(tmp_path: Path) -> None:
    """int16 columns of a matrix of 40,000 wrap; they are read as unsigned."""
    from deltakit.formats.bridges.csr import flat_of_rows

    shape = (3, 40_000)
    entries = torch.tensor([7, 39_999, 40_000 + 33_000]), torch.ones(3)
    _, offsets, columns, _ = csr(shape, entries)
    assert columns.min() < 0
    found = flat_of_rows("w", shape, offsets.numpy(), columns.numpy())
    assert found.tolist() == entries[0].tolist()
    with pytest.raises(FormatError, match="cannot tell 70000 columns apart"):
        flat_of_rows("w", (3, 70_000), offsets.numpy(), columns.numpy())


def test_the_base_is_needed_and_checked(tmp_path: Path, model: Model) -> None:
    base, state = model
    spiel = write_adapter(tmp_path / "spiel", SPIEL, spiel_tensors(entries_of(state)))
    shape = state[f"{Q}.weight"].shape
    layer = rosa_layer(Q, shape, random_entries(shape, 9, 0))
    rosa = write_adapter(tmp_path / "rosa", ROSA, layer)
    for source in (spiel, rosa):
        with pytest.raises(ConfigError, match="has no shapes of its weights; give the base"):
            convert(source, tmp_path / "out.sdelta")
    other = write_adapter(
        tmp_path / "other", SPIEL, spiel_tensors({"model.layers.7.x": entries_of(state)[Q]})
    )
    with pytest.raises(CoordinateError, match=r"has no tensor 'model\.layers\.7\.x\.weight'"):
        convert(other, tmp_path / "out.sdelta", base=base)


def test_a_hostile_adapter_is_refused(tmp_path: Path, model: Model) -> None:
    base, state = model
    trace = tmp_path / "trace"
    tensors: dict[str, Any] = spiel_tensors(entries_of(state)) | {"w": Attack(trace)}
    source = write_adapter(tmp_path / "spiel", SPIEL, tensors, pickled=True)
    assert recognise(source)[0] == "spiel"  # by the look of it
    refuse(source, base, r"asks for .*system")
    assert not trace.exists()
