"""SHiRA and Super-Tuning: adapters of peft itself, both ways, the merged model equal in every bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import write_bert, write_gpt2, write_llama

import deltakit as dk
from deltakit.errors import BaseMismatchError, ConfigError, CoordinateError, FormatError

pytest.importorskip("peft")
import torch
from adapters import State, differing, load_merged, load_plain, quietly, save_trained
from peft import ShiraConfig, SupertuningConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # peft's own tensors

DTYPES = ["float32", "bfloat16", "float16"]


def shira(**settings: Any) -> Any:
    given = {"target_modules": ["q_proj", "v_proj"], "init_weights": False, **settings}
    return ShiraConfig(r=2, **given)


def supertuning(**settings: Any) -> Any:
    given = {"target_modules": ["q_proj", "up_proj"], "init_weights": False, **settings}
    with quietly():
        return SupertuningConfig(sparsity=0.9, **given)


PEERS = {"peft-shira": shira, "peft-supertuning": supertuning}


class Made(NamedTuple):
    """A base, an adapter of it that peft trained and saved, and what peft merges them to."""

    base: Path
    adapter: Path
    merged: State


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Llama by dtype on disk."""
    root = tmp_path_factory.mktemp("bases")
    first = write_llama(root / "float32")
    found = {"float32": first}
    for dtype in DTYPES[1:]:
        found[dtype] = root / dtype
        with quietly():
            model = AutoModelForCausalLM.from_pretrained(first, dtype=dtype)
            model.save_pretrained(found[dtype])
    return found


@pytest.fixture(scope="module")
def made(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """Adapters of both types for bases of all dtypes, by "type dtype"."""
    root = tmp_path_factory.mktemp("adapters")
    found = {}
    for peer, config in PEERS.items():
        for dtype, base in bases.items():
            out = root / f"{peer}-{dtype}"
            merged = save_trained(base, AutoModelForCausalLM, config(), out, dtype=dtype)
            found[f"{peer} {dtype}"] = Made(base, out, merged)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("peer", list(PEERS))
def test_what_peft_merges_deltakit_merges(
    peer: str, dtype: str, made: dict[str, Made], tmp_path: Path
) -> None:
    base, adapter, theirs = made[f"{peer} {dtype}"]
    report = dk.convert(adapter, tmp_path / "d.sdelta", base=base)
    assert (report.from_format, report.to_format) == (peer, "sdelta")
    assert report.found.endswith("adapter, 4 modules")
    stored = load_file(adapter / "adapter_model.safetensors")
    assert report.entries == sum(a.size for a in stored.values() if a.dtype == np.float32)

    dk.merge(base, [tmp_path / "d.sdelta"], tmp_path / "merged")
    mine = load_plain(tmp_path / "merged", AutoModelForCausalLM, dtype=dtype)
    assert differing(mine, theirs) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", list(PEERS))
@pytest.mark.parametrize("peer", list(PEERS))
def test_back_to_peft(
    peer: str, to: str, dtype: str, made: dict[str, Made], tmp_path: Path
) -> None:
    """peft loads what deltakit writes, and merges it to the same bits; read again it is the same
    delta. Super-Tuning cannot hold all float32 values of a narrower base, and a note says so."""
    base, adapter, theirs = made[f"{peer} {dtype}"]
    dk.convert(adapter, tmp_path / "d.sdelta", base=base)
    report = dk.convert(tmp_path / "d.sdelta", tmp_path / "back", to_format=to, base=base)
    again = load_merged(base, AutoModelForCausalLM, tmp_path / "back", dtype=dtype)
    narrowed = peer == "peft-shira" and to == "peft-supertuning" and dtype != "float32"
    assert any("entries merge to slightly other values" in n for n in report.notes) == narrowed
    if narrowed:
        for name, tensor in theirs.items():
            assert torch.allclose(again[name].float(), tensor.float(), rtol=0.01, atol=1e-3)
        return
    assert differing(again, theirs) == []
    dk.convert(tmp_path / "back", tmp_path / "e.sdelta", base=base)
    one, other = dk.load(tmp_path / "d.sdelta"), dk.load(tmp_path / "e.sdelta")
    assert all(tensor.equals(other.tensors[name]) for name, tensor in one.tensors.items())
    assert one.base == other.base


def test_the_base_is_recorded(made: dict[str, Made], tmp_path: Path) -> None:
    base, adapter, _ = made["peft-shira float32"]
    dk.convert(adapter, tmp_path / "d.sdelta", base=base)
    delta = dk.load(tmp_path / "d.sdelta")
    assert delta.base is not None
    assert set(delta.base.tensors) == set(delta.tensors)
    assert delta.base.model_id == str(base)  # as peft's own configuration names it
    assert delta.provenance["lineage"] == [{"operation": "convert", "from": "peft-shira"}]


@pytest.mark.parametrize("peer", list(PEERS))
def test_a_head_and_a_prefix(peer: str, tmp_path: Path) -> None:
    """The checkpoint is a BertModel, the adapted model has `bert.` before its names and a head."""
    base = write_bert(tmp_path / "base")
    config = PEERS[peer](target_modules=["query"], task_type="SEQ_CLS")
    kind, options = AutoModelForSequenceClassification, {"num_labels": 3}
    theirs = save_trained(base, kind, config, tmp_path / "in", **options)
    report = dk.convert(tmp_path / "in", tmp_path / "d.sdelta", base=base)
    delta = dk.load(tmp_path / "d.sdelta")
    layers = [f"encoder.layer.{n}.attention.self.query.weight" for n in (0, 1)]
    assert list(delta.tensors) == layers
    assert list(delta.extras) == ["classifier.bias", "classifier.weight"]
    assert report.extra_weights == 3 * 16 + 3
    dk.merge(base, [tmp_path / "d.sdelta"], tmp_path / "merged")
    assert differing(load_plain(tmp_path / "merged", kind, **options), theirs) == []

    back = tmp_path / "back"
    dk.convert(tmp_path / "d.sdelta", back, to_format=peer, base=base, prefix="bert.")
    config = json.loads((back / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"bert.{name.removesuffix('.weight')}" for name in layers]
    assert config["modules_to_save"] == ["classifier"]
    assert differing(load_merged(base, kind, back, **options), theirs) == []


def test_set_tensors_become_differences(made: dict[str, Made], tmp_path: Path) -> None:
    base, adapter, theirs = made["peft-shira float32"]
    dk.convert(adapter, tmp_path / "d.sdelta", base=base)
    dk.save(dk.rebase(dk.load(tmp_path / "d.sdelta"), base, "set"), tmp_path / "s.sdelta")
    with pytest.raises(ConfigError, match="holds new weights; give the base"):
        dk.convert(tmp_path / "s.sdelta", tmp_path / "back", to_format="peft-shira")
    dk.convert(tmp_path / "s.sdelta", tmp_path / "back", to_format="peft-shira", base=base)
    again = load_merged(base, AutoModelForCausalLM, tmp_path / "back")
    assert differing(again, theirs) == []


def test_without_stored_indices(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["float32"]
    config = supertuning(save_precomputed_indices=False)
    theirs = save_trained(base, AutoModelForCausalLM, config, tmp_path / "in")
    stored = load_file(tmp_path / "in" / "adapter_model.safetensors")
    assert not any(key.endswith("supertuning_indices") for key in stored)
    report = dk.convert(tmp_path / "in", tmp_path / "d.sdelta", base=base)
    assert "no indices were saved; they are computed from the base's weights" in report.notes
    dk.merge(base, [tmp_path / "d.sdelta"], tmp_path / "merged")
    assert differing(load_plain(tmp_path / "merged", AutoModelForCausalLM), theirs) == []


def test_without_stored_indices_the_smallest(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["float32"]
    config = supertuning(save_precomputed_indices=False, select_top=False)
    theirs = save_trained(base, AutoModelForCausalLM, config, tmp_path / "in")
    dk.convert(tmp_path / "in", tmp_path / "d.sdelta", base=base)
    dk.merge(base, [tmp_path / "d.sdelta"], tmp_path / "merged")
    assert differing(load_plain(tmp_path / "merged", AutoModelForCausalLM), theirs) == []


def test_equal_magnitudes_hide_the_support(bases: dict[str, Path], tmp_path: Path) -> None:
    """bfloat16 has few magnitudes; which of equal ones peft took, and in which order, is open."""
    base = bases["bfloat16"]
    config = supertuning(save_precomputed_indices=False)
    save_trained(base, AutoModelForCausalLM, config, tmp_path / "in", dtype="bfloat16")
    with pytest.raises(FormatError, match=r"saved without indices, and .* equal another in size"):
        dk.convert(tmp_path / "in", tmp_path / "d.sdelta", base=base)


def test_another_sparsity_is_another_base(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["float32"]
    config = supertuning(save_precomputed_indices=False)
    save_trained(base, AutoModelForCausalLM, config, tmp_path / "in")
    edit_config(tmp_path / "in", sparsity=0.8)
    with pytest.raises(BaseMismatchError, match=r"sparsity 0\.8 of 512 weights gives 102"):
        dk.convert(tmp_path / "in", tmp_path / "d.sdelta", base=base)
    for nothing in (-1e308, 1, None, "0.9"):
        edit_config(tmp_path / "in", sparsity=nothing)
        with pytest.raises(FormatError, match="has no sparsity to compute supports from"):
            dk.convert(tmp_path / "in", tmp_path / "d.sdelta", base=base)


def test_supra_is_made_sparse(bases: dict[str, Path], tmp_path: Path) -> None:
    """The hybrid with low-rank factors: whole it merges as peft does, cut it keeps the largest."""
    base = bases["float32"]
    theirs = save_trained(base, AutoModelForCausalLM, supertuning(r=2), tmp_path / "in")
    with pytest.raises(ConfigError, match=r"has a low-rank part beside its entries \(Supra\)"):
        dk.convert(tmp_path / "in", tmp_path / "d.sdelta", base=base)
    report = dk.convert(tmp_path / "in", tmp_path / "d.sdelta", base=base, density=1.0)
    assert report.retained == 1.0
    dk.merge(base, [tmp_path / "d.sdelta"], tmp_path / "merged")
    mine = load_plain(tmp_path / "merged", AutoModelForCausalLM)
    for name, tensor in theirs.items():
        assert torch.allclose(mine[name], tensor, rtol=0, atol=1e-6), name

    whole = dk.load(tmp_path / "d.sdelta")
    dk.convert(tmp_path / "in", tmp_path / "e.sdelta", base=base, budget=50)
    cut, best = dk.load(tmp_path / "e.sdelta"), dk.truncate(whole, 50)
    assert all(tensor.equals(best.tensors[name]) for name, tensor in cut.tensors.items())
    assert cut.nnz == 50
    report = dk.convert(tmp_path / "in", tmp_path / "f.sdelta", base=base, lossy=True)
    assert report.notes == ("the low-rank parts of 4 modules are left out",)


def test_a_budget_is_for_low_rank_parts(made: dict[str, Made], tmp_path: Path) -> None:
    for peer in PEERS:
        base, adapter, _ = made[f"{peer} float32"]
        with pytest.raises(ConfigError, match="is sparse as it is"):
            dk.convert(adapter, tmp_path / "d.sdelta", base=base, budget=5)


@pytest.mark.parametrize("peer", list(PEERS))
def test_the_base_is_needed(peer: str, made: dict[str, Made], tmp_path: Path) -> None:
    adapter = made[f"{peer} float32"].adapter
    with pytest.raises(ConfigError, match=r"no shapes of its weights; give the base \(--base\)"):
        dk.convert(adapter, tmp_path / "d.sdelta")
    other = write_gpt2(tmp_path / "other")
    with pytest.raises(CoordinateError, match=r"has no tensor .*, with or without a prefix"):
        dk.convert(adapter, tmp_path / "d.sdelta", base=other)
    assert not (tmp_path / "d.sdelta").exists()


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit(folder: Path, ending: str, change: Any) -> None:
    """Change the first tensor of the adapter whose key has this ending."""
    file = folder / "adapter_model.safetensors"
    arrays = load_file(file)
    key = next(k for k in sorted(arrays) if k.endswith(ending))
    arrays[key] = np.array(change(arrays[key]), order="C")
    save_file(arrays, file)


def with_first(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.copy()
    changed.reshape(-1)[0] = value
    return changed


HOSTILE = {
    "row out of range": ("shira_indices", lambda a: with_first(a, 16), "coordinate 16 is out of"),
    "negative": ("shira_indices", lambda a: with_first(a, -1), "coordinate -1 is out of range"),
    "entry twice": ("shira_indices", lambda a: a[:, [0, *range(a.shape[1] - 1)]], "stands twice"),
    "three axes": ("shira_indices", lambda a: np.vstack([a, a[:1]]), r"expected \[2, nnz\]"),
    "too few": ("shira_indices", lambda a: a[:, :-1], "64 values for 63 indices"),
    "halves": ("shira_indices", lambda a: a + np.float32(0.5), "expected whole numbers"),
    "rounded": (
        "shira_indices",
        lambda a: with_first(a.astype(np.float32), 2**24),
        "cannot tell those above 16777216 apart",
    ),
    "not finite": ("shira_weight", lambda a: with_first(a, np.inf), "is not finite"),
    "not a number": ("supertuning_values", lambda a: with_first(a, np.nan), "is not finite"),
    "out of range": ("supertuning_indices", lambda a: with_first(a, 512), "index 512 is out of"),
    "index twice": ("supertuning_indices", lambda a: with_first(a, a[1]), "stands twice"),
    "a number": ("supertuning_values", lambda a: a[0].reshape(()), r"has no .*_values \[k\]"),
    "matrix": ("supertuning_indices", lambda a: a.reshape(1, -1), r"expected integers \[nnz\]"),
}


@pytest.mark.parametrize("attack", list(HOSTILE))
def test_hostile_adapters_are_refused(attack: str, made: dict[str, Made], tmp_path: Path) -> None:
    ending, change, message = HOSTILE[attack]
    peer = "peft-shira" if ending.startswith("shira") else "peft-supertuning"
    base, adapter, _ = made[f"{peer} float32"]
    shutil.copytree(adapter, tmp_path / "in")
    edit(tmp_path / "in", ending, change)
    with pytest.raises(dk.DeltakitError, match=message):
        dk.convert(tmp_path / "in", tmp_path / "d.sdelta", base=base)
    assert not (tmp_path / "d.sdelta").exists()


def test_float_indices_of_windows_are_read(made: dict[str, Made], tmp_path: Path) -> None:
    base, adapter, _ = made["peft-shira float32"]
    shutil.copytree(adapter, tmp_path / "in")
    dk.convert(tmp_path / "in", tmp_path / "d.sdelta", base=base)
    edit(tmp_path / "in", "shira_indices", lambda a: a.astype(np.float32))
    dk.convert(tmp_path / "in", tmp_path / "e.sdelta", base=base)
    assert dk.load(tmp_path / "d.sdelta").equals(dk.load(tmp_path / "e.sdelta"))


def one_tensor(name: str, shape: tuple[int, ...], count: int) -> dk.SparseDelta:
    tensor = dk.TensorDelta(
        name=name,
        shape=shape,
        dtype="float32",
        mode="add",
        indices=np.arange(count),
        values=np.ones(count, np.float32),
        order=np.arange(count),
    )
    return dk.SparseDelta(tensors={name: tensor})


def test_shira_has_a_limit_that_super_tuning_has_not(tmp_path: Path) -> None:
    """Of a 4 by 4 weight SHiRA takes 8 or 16 entries: 9 need r = 2, and 16 = 2 * (4 + 4) fit; of a
    2 by 2 weight 3 entries would need 4; of a 3 by 2 weight 6 would need 10."""
    for shape, count, fits in (((4, 4), 9, True), ((2, 2), 3, True), ((3, 2), 6, False)):
        dk.save(one_tensor("m.weight", shape, count), tmp_path / "d.sdelta")
        for to in PEERS:
            out = tmp_path / f"{to}-{shape[0]}"
            if to == "peft-shira" and not fits:
                with pytest.raises(ConfigError, match="write peft-supertuning instead"):
                    dk.convert(tmp_path / "d.sdelta", out, to_format=to)
            else:
                report = dk.convert(tmp_path / "d.sdelta", out, to_format=to)
                assert "the order of unmasking is lost" in report.notes


def test_what_adapters_cannot_hold(tmp_path: Path) -> None:
    shapes = {"m.bias": (4,), "wte.weight": (4, 4), "m.weight": (4, 4)}
    tensors = {name: one_tensor(name, shape, 2).tensors[name] for name, shape in shapes.items()}
    dk.save(dk.SparseDelta(tensors=tensors), tmp_path / "d.sdelta")
    with pytest.raises(ConfigError, match=r"2 tensors \(such as 'm.bias'\) are something else"):
        dk.convert(tmp_path / "d.sdelta", tmp_path / "out", to_format="peft-shira")
    report = dk.convert(tmp_path / "d.sdelta", tmp_path / "out", to_format="peft-shira", lossy=True)
    assert "4 entries in 2 tensors are left out" in report.notes
    assert report.entries == 6  # of the delta; the adapter has those of `m.weight`
    dk.save(dk.SparseDelta(tensors={"m.bias": tensors["m.bias"]}), tmp_path / "d.sdelta")
    with pytest.raises(ConfigError, match="no entries in weights of linear layers, for SHiRA"):
        dk.convert(tmp_path / "d.sdelta", tmp_path / "b", to_format="peft-shira", lossy=True)


def test_layers_that_lie_the_other_way_are_refused(tmp_path: Path) -> None:
    base = write_gpt2(tmp_path / "base")
    shape = (16, 48)
    delta = one_tensor("transformer.h.0.attn.c_attn.weight", shape, 3)
    dk.save(delta, tmp_path / "d.sdelta")
    with pytest.raises(ConfigError, match="layers of a gpt2 are transformers' Conv1D"):
        dk.convert(tmp_path / "d.sdelta", tmp_path / "out", to_format="peft-shira", base=base)
