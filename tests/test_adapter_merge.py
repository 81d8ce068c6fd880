"""Adapters folded into a base: the bits of a naive dense reference, however the merge is cut up."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_factory import write_safetensors, write_sharded
from fold_lab import LORA, adapter_on, array_of, naive_merge, naive_product, row_norms, values_of
from merge_reference import adding, only

from deltakit import SparseDelta, TensorDelta, load, merge, merge_in_place, save, stack
from deltakit.adapters import fold_products
from deltakit.dtypes import Array
from deltakit.errors import BaseMismatchError, CoordinateError, DeltaError, DeltakitError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.merging import files

Values = dict[str, Array]
STRAIGHT = {**LORA, "fan_in_fan_out": False}
TURNED = {**LORA, "fan_in_fan_out": True}
IN, OUT = 14, 10


def make_base(folder: Path, dtype: Any = np.float32, shape: tuple[int, ...] = (OUT, IN)) -> Path:
    rng = np.random.default_rng(5)
    tensors = {
        "m.weight": rng.normal(0, 1, shape).astype(dtype),
        "m.bias": rng.normal(0, 1, OUT).astype(dtype),
        "other": rng.normal(0, 1, 7).astype(dtype),
    }
    tensors["m.weight"].reshape(-1)[3] = -0.0
    return write_safetensors(folder / "base.safetensors", tensors)


def merged(folder: Path, base: Path, deltas: Any, name: str = "m.weight", **more: Any) -> Array:
    merge(base, deltas, folder / "out.safetensors", force=True, **more)
    return array_of(Checkpoint(folder / "out.safetensors"), name)


def lora(values: Values, base: Array, config: dict[str, Any]) -> Array:
    scaling = np.float32(config["lora_alpha"] / config["r"])
    up, down = values["lora_B.weight"].reshape(-1, 4), values["lora_A.weight"].reshape(4, -1)
    change = naive_product(up, down) * scaling
    return (change.T if config["fan_in_fan_out"] else change).reshape(base.shape)


def rslora(values: Values, base: Array, config: dict[str, Any]) -> Array:
    product = naive_product(values["lora_B.weight"], values["lora_A.weight"])
    return np.asarray(product * np.float32(config["lora_alpha"] / 2))


def dora(values: Values, base: Array, config: dict[str, Any]) -> Array:
    turned = config["fan_in_fan_out"]
    moved = base.astype(np.float32) + lora(values, base, config)
    magnitude = values["lora_magnitude_vector.weight"]
    gain = magnitude / row_norms(moved, turned, magnitude.shape)
    column = gain[None, :] if turned else gain.reshape(-1, *[1] * (base.ndim - 1))
    return np.asarray(column * moved - base.astype(np.float32))


def adalora(values: Values, base: Array, config: dict[str, Any]) -> Array:
    product = naive_product(values["lora_B"], values["lora_A"] * values["lora_E"])
    return np.asarray(product * np.float32(6 / (4 + 1e-5)))


def embedding(values: Values, base: Array, config: dict[str, Any]) -> Array:
    product = naive_product(values["lora_embedding_B"], values["lora_embedding_A"])
    return np.asarray(product * np.float32(1.5)).T


def ia3(values: Values, base: Array, config: dict[str, Any]) -> Array:
    gain = values["ia3_l"].T if config["fan_in_fan_out"] else values["ia3_l"]
    return np.asarray(base.astype(np.float32) * (gain - np.float32(1)))


def loha(values: Values, base: Array, config: dict[str, Any]) -> Array:
    one = naive_product(values["hada_w1_a"], values["hada_w1_b"])
    other = naive_product(values["hada_w2_a"], values["hada_w2_b"])
    return np.asarray(one * other * np.float32(1.5))


def lokr(values: Values, base: Array, config: dict[str, Any]) -> Array:
    second = values.get("lokr_w2")
    if second is None:
        second = naive_product(values["lokr_w2_a"], values["lokr_w2_b"])
    return np.asarray(np.kron(values["lokr_w1"], second) * np.float32(1.5))


FACTORS = {"lora_A.weight": (4, IN), "lora_B.weight": (OUT, 4)}
LYCORIS = {"r": 4, "alpha": 6, "rank_pattern": {}, "alpha_pattern": {}}
HADAMARD = {
    "hada_w1_a": (OUT, 4),
    "hada_w1_b": (4, IN),
    "hada_w2_a": (OUT, 4),
    "hada_w2_b": (4, IN),
}
Reference = Callable[[Values, Array, dict[str, Any]], Array]
# kind, configuration, parameters, shape of the base's tensor, reference
CASES: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]], tuple[int, ...], Reference]] = {
    "lora": ("lora", STRAIGHT, FACTORS, (OUT, IN), lora),
    "Conv1D": ("lora", TURNED, FACTORS, (IN, OUT), lora),
    "square Conv1D": ("lora", TURNED, {**FACTORS, "lora_A.weight": (4, OUT)}, (OUT, OUT), lora),
    "rslora": ("lora", {**STRAIGHT, "use_rslora": True}, FACTORS, (OUT, IN), rslora),
    "alpha pattern": ("lora", {**STRAIGHT, "alpha_pattern": {"m": 12}, "lora_alpha": 12}, FACTORS, (OUT, IN), lora),
    "conv2d": ("lora", STRAIGHT, {"lora_A.weight": (4, 3, 2, 2), "lora_B.weight": (OUT, 4, 1, 1)}, (OUT, 3, 2, 2), lora),
    "embedding": ("lora", STRAIGHT, {"lora_embedding_A": (4, 20), "lora_embedding_B": (OUT, 4)}, (20, OUT), embedding),
    "dora": ("dora", STRAIGHT, {**FACTORS, "lora_magnitude_vector.weight": (OUT,)}, (OUT, IN), dora),
    "dora Conv1D": ("dora", TURNED, {**FACTORS, "lora_magnitude_vector.weight": (OUT,)}, (IN, OUT), dora),
    "adalora": ("adalora", STRAIGHT, {"lora_A": (4, IN), "lora_B": (OUT, 4), "lora_E": (4, 1)}, (OUT, IN), adalora),
    "ia3 outputs": ("ia3", {"fan_in_fan_out": False}, {"ia3_l": (OUT, 1)}, (OUT, IN), ia3),
    "ia3 inputs": ("ia3", {"fan_in_fan_out": False}, {"ia3_l": (1, IN)}, (OUT, IN), ia3),
    "ia3 Conv1D": ("ia3", {"fan_in_fan_out": True}, {"ia3_l": (OUT, 1)}, (IN, OUT), ia3),
    "loha": ("loha", LYCORIS, HADAMARD, (OUT, IN), loha),
    "lokr": ("lokr", LYCORIS, {"lokr_w1": (2, 7), "lokr_w2": (5, 2)}, (OUT, IN), lokr),
    "lokr in factors": ("lokr", LYCORIS, {"lokr_w1": (2, 2), "lokr_w2_a": (5, 4), "lokr_w2_b": (4, 7)}, (OUT, IN), lokr),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("case", CASES)
def test_folded_weights_are_those_of_the_dense_reference(
    tmp_path: Path, case: str, dtype: Any
) -> None:
    kind, config, parameters, shape, reference = CASES[case]
    base = make_base(tmp_path, dtype, shape)
    delta = adapter_on(base, {"m": parameters}, kind, config)
    before = array_of(Checkpoint(base), "m.weight")
    change = reference(values_of(delta, base)["m"], before, config)
    for weight in (1.0, 0.3):
        found = merged(tmp_path, base, delta, weights=[weight])
        assert found.tobytes() == naive_merge(before, [(weight, change)]).tobytes()
        assert (found != before).any()


@pytest.mark.parametrize("case", ["lora", "Conv1D", "dora", "dora Conv1D", "ia3 outputs", "loha"])
@pytest.mark.parametrize("block", [1, 3, 16, 100])
def test_the_size_of_windows_and_blocks_does_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, block: int
) -> None:
    kind, config, parameters, shape, _ = CASES[case]
    base = make_base(tmp_path, np.float32, shape)
    delta = adapter_on(base, {"m": parameters}, kind, config)
    whole = merged(tmp_path, base, delta)
    monkeypatch.setattr(files, "WINDOW", block + 2)
    monkeypatch.setattr(fold_products, "BLOCK", block)
    assert merged(tmp_path, base, delta).tobytes() == whole.tobytes()


@pytest.mark.parametrize(("left", "right"), [*itertools.product((0.0, 0.1, 0.6, 1.0), repeat=2)])
def test_skipping_zeros_changes_no_bit(left: float, right: float) -> None:
    rng = np.random.default_rng(0)

    def factor(shape: tuple[int, int], density: float) -> Array:
        values = rng.normal(0, 1, shape).astype(np.float32)
        zero = np.float32(-0.0) if density == 0.6 else np.float32(0)
        return np.where(rng.random(shape) < density, values, zero)

    one, other = factor((23, 8), left), factor((8, 31), right)
    made = fold_products.Product(one, other, 0.7).rows(2, 20)
    expected = naive_product(one, other)[2:20] * np.float32(0.7)
    assert (made + 0).tobytes() == (expected + 0).tobytes()  # zeros of either sign are alike


def test_biases_move_with_lora_bias_and_ia3(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    before = array_of(Checkpoint(base), "m.bias")
    delta = adapter_on(base, {"m": {**FACTORS, "lora_B.bias": (OUT,)}})
    change = values_of(delta)["m"]["lora_B.bias"] * np.float32(1.5)
    found = merged(tmp_path, base, delta, "m.bias")
    assert found.tobytes() == naive_merge(before, [(1, change)]).tobytes()
    delta = adapter_on(base, {"m": {"ia3_l": (OUT, 1)}}, "ia3", {"fan_in_fan_out": False})
    change = before * (values_of(delta)["m"]["ia3_l"].reshape(-1) - np.float32(1))
    found = merged(tmp_path, base, delta, "m.bias")
    assert found.tobytes() == naive_merge(before, [(1, change)]).tobytes()


def test_plain_deltas_and_adapters_at_one_tensor_add_up_in_order(tmp_path: Path) -> None:
    base = make_base(tmp_path, ml_dtypes.bfloat16)
    before = array_of(Checkpoint(base), "m.weight")
    plain = adding("m.weight", before, np.random.default_rng(1), 40)
    dense = np.zeros(before.size, np.float32)
    dense[plain.indices] = plain.values
    one, two = adapter_on(base, {"m": FACTORS}), adapter_on(base, {"m": FACTORS}, seed=9)
    changes = [lora(values_of(d)["m"], before, STRAIGHT) for d in (one, two)]
    terms = [(0.5, changes[0]), (-1.0, dense.reshape(before.shape)), (0.7, changes[1])]
    found = merged(tmp_path, base, [one, only(plain), two], weights=[0.5, -1.0, 0.7])
    assert found.tobytes() == naive_merge(before, terms).tobytes()


def test_set_entries_are_terms_where_an_adapter_moves_the_same_weight(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    before = array_of(Checkpoint(base), "m.weight")
    bits = TensorDelta(
        name="m.weight",
        shape=before.shape,
        dtype="float32",
        mode="set",
        indices=np.array([0, 60]),
        values=np.array([5, 6], np.float32),
    )
    delta = adapter_on(base, {"m": FACTORS}, density=1.0)
    change = lora(values_of(delta)["m"], before, STRAIGHT)
    dense = np.zeros(before.size, np.float32)
    dense[[0, 60]] = np.array([5, 6], np.float32) - before.reshape(-1)[[0, 60]]
    found = merged(tmp_path, base, [only(bits), delta])
    assert (
        found.tobytes()
        == naive_merge(before, [(1, dense.reshape(before.shape)), (1, change)]).tobytes()
    )


def test_what_no_factor_reaches_keeps_its_bits(tmp_path: Path) -> None:
    """Also -0 and NaN payloads, which adding 0 would change."""
    weights = np.random.default_rng(0).normal(0, 1, (OUT, IN)).astype(np.float32)
    weights[2] = -0.0
    weights[3].view(np.uint32)[:] = 0x7F800123  # a signalling NaN
    base = write_safetensors(tmp_path / "b.safetensors", {"m.weight": weights})
    at = np.array([0, 4 * 9])  # rows 0 and 9 of lora_B
    delta = adapter_on(base, {"m": FACTORS}, density=0.0)
    up = replace(delta.tensors["m.lora_B.weight"], indices=at, values=[0.5, -0.5], order=None)
    delta = replace(delta, tensors={**delta.tensors, up.name: up})
    found = merged(tmp_path, base, delta)
    assert found[1:9].tobytes() == weights[1:9].tobytes()
    assert (found[[0, 9]] != weights[[0, 9]]).all()


def test_stored_initial_values_are_subtracted_and_not_written(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    before = array_of(Checkpoint(base), "m.weight")
    delta = adapter_on(base, {"m": FACTORS}, stored=True)
    starts = {n.removeprefix("adapter.initial.m."): a for n, a in delta.extras.items()}
    change = lora(values_of(delta)["m"], before, STRAIGHT) - lora(starts, before, STRAIGHT)
    report = merge(base, delta, tmp_path / "o.safetensors")
    out = Checkpoint(tmp_path / "o.safetensors")
    assert out.names == Checkpoint(base).names and not report.extras
    assert array_of(out, "m.weight").tobytes() == naive_merge(before, [(1, change)]).tobytes()


def test_dtypes_convert_after_folding_and_trained_keeps_the_base(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    delta = adapter_on(base, {"m": FACTORS})
    plain = merged(tmp_path, base, delta)
    half = merged(tmp_path, base, delta, dtype="bfloat16")
    assert half.tobytes() == plain.astype(ml_dtypes.bfloat16).tobytes()
    assert merged(tmp_path, base, delta, dtype="trained").tobytes() == plain.tobytes()


def sharded(folder: Path) -> tuple[Path, Path, SparseDelta]:
    """The same tensors in one file and in three, with a head for an adapter's delta."""
    rng = np.random.default_rng(2)
    tensors = {f"l{n}.weight": rng.normal(0, 1, (OUT, IN)).astype(np.float32) for n in range(6)}
    one = write_safetensors(folder / "one.safetensors", tensors)
    names = list(tensors)
    shards = [{n: tensors[n] for n in names[at : at + 2]} for at in (0, 2, 4)]
    many = write_sharded(folder / "many", shards, {"hidden": 1})
    modules = {f"l{n}": FACTORS for n in (0, 2, 3, 5)}
    head = {"head.weight": np.ones((2, 3), np.float32)}
    return one, many, adapter_on(one, modules, extras=head)


def test_shards_and_workers_do_not_show(tmp_path: Path) -> None:
    one, many, delta = sharded(tmp_path)
    merge(one, delta, tmp_path / "a.safetensors")
    for workers in (1, 3):
        merge(many, delta, tmp_path / f"w{workers}", workers=workers)
        out = Checkpoint(tmp_path / f"w{workers}")
        single = Checkpoint(tmp_path / "a.safetensors")
        assert out.names == single.names and "head.weight" in out.names
        assert all((out.words(n) == single.words(n)).all() for n in out.names)
        moved = [
            n for n in Checkpoint(one).names if (out.words(n) != Checkpoint(one).words(n)).any()
        ]
        assert moved == ["l0.weight", "l2.weight", "l3.weight", "l5.weight"]


def test_a_merge_goes_on_with_the_same_adapter_only(tmp_path: Path) -> None:
    """The key of a merge that was killed holds the seed, which is in no tensor."""
    from deltakit.lineage import digest

    delta = adapter_on(None, {"m": FACTORS})
    assert delta.adapter is not None
    other = replace(delta, adapter=replace(delta.adapter, seed=4))
    assert digest(delta) != digest(other) == digest(other)
    save(delta, tmp_path / "d.sdelta")
    assert digest(load(tmp_path / "d.sdelta")) == digest(delta)


def test_a_dry_run_writes_nothing_and_tells_what_would_be(tmp_path: Path) -> None:
    _, many, delta = sharded(tmp_path)
    told = merge(many, delta, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    done = merge(many, delta, tmp_path / "out")
    assert replace(done, dry_run=True) == told
    assert (done.tensors, done.entries, done.extras) == (4, delta.nnz, ("head.weight",))


@pytest.mark.parametrize("case", ["lora", "dora Conv1D", "ia3 inputs"])
def test_memory_stays_below_what_the_report_says(tmp_path: Path, case: str) -> None:
    import tracemalloc

    rows, columns = 1500, 700
    kind, config, _, _, _ = CASES[case]
    turned = config["fan_in_fan_out"]
    shape = (columns, rows) if turned else (rows, columns)
    weights = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    base = write_safetensors(tmp_path / "b.safetensors", {"m.weight": weights})
    parameters: dict[str, tuple[int, ...]]
    parameters = {"lora_A.weight": (4, columns), "lora_B.weight": (rows, 4)}
    if kind == "dora":
        parameters["lora_magnitude_vector.weight"] = (rows,)
    if kind == "ia3":
        parameters = {"ia3_l": (1, columns)}
    save(adapter_on(base, {"m": parameters}, kind, config), tmp_path / "d.sdelta")
    del weights
    tracemalloc.start()
    report = merge(base, tmp_path / "d.sdelta", tmp_path / "o.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < report.peak_memory < 8 * peak


def test_another_base_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    delta = adapter_on(base, {"m": FACTORS})
    tensors = {n: array_of(Checkpoint(base), n) for n in Checkpoint(base).names}
    moved = {**tensors, "m.weight": tensors["m.weight"] + np.float32(1)}
    other = write_safetensors(tmp_path / "other.safetensors", moved)
    with pytest.raises(BaseMismatchError, match=r"tensor 'm\.weight' has other values"):
        merge(other, delta, tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()
    report = merge(other, delta, tmp_path / "o.safetensors", allow_base_mismatch=True)
    assert any("other values" in note for note in report.notes)
    del moved["m.weight"]
    lacks = write_safetensors(tmp_path / "lacks.safetensors", moved)
    with pytest.raises(CoordinateError, match=r"m\.weight"):
        merge(lacks, delta, tmp_path / "p.safetensors", allow_base_mismatch=True)
    moved["m.weight"] = tensors["m.weight"][:, :5]
    small = write_safetensors(tmp_path / "small.safetensors", moved)
    with pytest.raises(CoordinateError, match=r"10 outputs of 14 inputs.*\[10, 5\]"):
        merge(small, delta, tmp_path / "p.safetensors", allow_base_mismatch=True)


@pytest.mark.parametrize("allow", [False, True])
def test_a_wrong_seed_is_refused(tmp_path: Path, allow: bool) -> None:
    base = make_base(tmp_path)
    delta = adapter_on(base, {"m": FACTORS})
    assert delta.adapter is not None
    wrong = replace(delta, adapter=replace(delta.adapter, seed=4))
    with pytest.raises(BaseMismatchError, match="check value"):
        merge(base, wrong, tmp_path / "o.safetensors", allow_base_mismatch=allow)
    assert not (tmp_path / "o.safetensors").exists()


def test_what_does_not_fold_is_refused_in_one_line(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    plain = adapter_on(base, {"m": FACTORS})
    assert plain.adapter is not None
    for kind, config, parameters, why in [
        ("pfeiffer", {}, FACTORS, "only those of kind lora, dora, "),
        ("lora", {**STRAIGHT, "alora_invocation_tokens": [1]}, FACTORS, "depends on the input"),
        ("lora", STRAIGHT, {**FACTORS, "ia3_l": (OUT, 1)}, "nothing is known of its parameter"),
        ("lora", STRAIGHT, {"lora_A.weight": (4, IN)}, "its parameters at 'm' are lora_A.weight"),
        ("lora", {"r": 4}, FACTORS, "lacks 'lora_alpha'"),
    ]:
        delta = adapter_on(base, {"m": parameters}, kind, config)
        with pytest.raises(DeltaError, match=why) as caught:
            merge(base, delta, tmp_path / "o.safetensors")
        assert "deltakit convert" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "o.safetensors").exists()


def test_stacking_and_merging_in_place_say_what_works_instead(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    delta, data = adapter_on(base, {"m": FACTORS}), base.read_bytes()
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: stack([delta, delta]), "--weights"),
        (lambda: merge(base, [delta, delta], tmp_path / "o", method="ties"), "--weights"),
        (lambda: merge(base, delta, tmp_path / "o", weights=[{"*": 0.5}]), "--weights"),
        (lambda: merge_in_place(base, delta), "leave out --in-place"),
    ]
    for call, instead in refused:
        with pytest.raises(DeltaError, match=instead):
            call()
    assert base.read_bytes() == data and [p.name for p in tmp_path.iterdir()] == [base.name]


def test_an_extra_does_not_hide_what_an_adapter_changes(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    whole = SparseDelta(tensors={}, extras={"m.weight": np.zeros((OUT, IN), np.float32)})
    with pytest.raises(DeltakitError, match="an adapter stands at it"):
        merge(base, [adapter_on(base, {"m": FACTORS}), whole], tmp_path / "o.safetensors")


def test_a_quantised_tensor_is_refused(tmp_path: Path) -> None:
    codes = np.zeros((OUT, IN), np.int8)
    tensors = {"m.weight": codes, "m.SCB": np.ones(OUT, np.float32)}
    base = write_safetensors(tmp_path / "b.safetensors", tensors)
    delta = replace(adapter_on(None, {"m": FACTORS}), base=None)
    for requantize in (False, True):
        with pytest.raises(BaseMismatchError, match="full-precision base"):
            merge(base, delta, tmp_path / "o.safetensors", requantize=requantize)
