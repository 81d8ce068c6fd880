"""Whatever takes deltas works on those of adapters, or says in one line that it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import write_safetensors
from click.testing import CliRunner
from fold_lab import adapter_on, array_of, naive_product, values_of

import deltakit as dk
from deltakit import SparseDelta
from deltakit.adapters.initial import all_initial_values
from deltakit.cli.main import COMMANDS, main
from deltakit.comparing.base_agreement import base_agreement
from deltakit.dtypes import Array
from deltakit.errors import DeltaError, DeltakitError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import identify

FACTORS = {"lora_A.weight": (4, 14), "lora_B.weight": (10, 4)}


@dataclass(frozen=True)
class Lab:
    """A base, a LoRA on two of its modules, another of another seed, and a delta of weights."""

    folder: Path
    base: Path
    delta: SparseDelta
    other: SparseDelta
    plain: SparseDelta

    @property
    def file(self) -> Path:
        return self.folder / "a.sdelta"

    @property
    def weights(self) -> Array:
        return np.zeros((10, 14), np.float32)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    rng = np.random.default_rng(0)
    tensors = {f"{m}.weight": rng.normal(0, 1, (10, 14)).astype(np.float32) for m in "mn"}
    base = write_safetensors(tmp_path / "base.safetensors", tensors)
    delta, other = (adapter_on(base, {"m": FACTORS, "n": FACTORS}, seed=s) for s in (3, 4))
    entries = dk.TensorDelta(
        name="m.weight",
        shape=(10, 14),
        dtype="float32",
        mode="add",
        indices=np.arange(5),
        values=np.ones(5, np.float32),
    )
    found = Lab(tmp_path, base, delta, other, SparseDelta(tensors={"m.weight": entries}))
    dk.save(delta, found.file)
    dk.save(other, tmp_path / "b.sdelta")
    return found


def whole(delta: SparseDelta, like: SparseDelta) -> SparseDelta:
    """The delta, proven to be one of the same adapter, with all its tensors and what it stands at."""
    assert delta.adapter == like.adapter and list(delta.tensors) == list(like.tensors)
    assert delta.base is not None and like.base is not None
    outside = [n for n in like.base.tensors if n not in like.tensors]
    assert outside and all(delta.base.tensors[n] == like.base.tensors[n] for n in outside)
    all_initial_values(delta)
    return delta


def works_truncate(lab: Lab) -> None:
    small = whole(dk.truncate(lab.delta, 7), lab.delta)
    sizes = [
        np.sort(np.concatenate([abs(t.values) for t in d.tensors.values()]))
        for d in (small, lab.delta)
    ]
    assert sizes[0].tolist() == sizes[1][-7:].tolist()
    share = whole(dk.truncate(lab.delta, "5%"), lab.delta)  # of the adapter's weights
    assert share.nnz == 2 * (4 * 14 + 10 * 4) * 5 // 100
    early = whole(dk.truncate(lab.delta, 9, by="order"), lab.delta)
    steps = [
        np.sort(np.concatenate([t.order for t in d.tensors.values()])) for d in (early, lab.delta)
    ]
    assert steps[0].tolist() == steps[1][:9].tolist()


def works_intersect(lab: Lab) -> None:
    part = dk.truncate(lab.delta, 20)
    assert whole(dk.intersect(lab.delta, part), lab.delta).nnz == 20
    for other in (lab.other, lab.plain):
        with pytest.raises(DeltaError, match="do not stand at the same weights"):
            dk.intersect(lab.delta, other)


def works_restrict(lab: Lab) -> None:
    found = whole(dk.restrict(lab.delta, "m.*"), lab.delta)
    assert found.nnz == sum(t.nnz for n, t in lab.delta.tensors.items() if n.startswith("m."))
    stored = adapter_on(lab.base, {"m": FACTORS, "n": FACTORS}, stored=True)
    assert len(whole(dk.restrict(stored, "m.*"), stored).extras) == 4
    with pytest.raises(DeltaError, match="do not stand at the same weights"):
        dk.restrict(lab.delta, support=lab.other)


def works_merge(lab: Lab) -> None:
    report = dk.merge(lab.base, [lab.delta, lab.plain], lab.folder / "o.safetensors")
    assert (report.tensors, report.entries) == (2, lab.delta.nnz + 5)


def works_compare(lab: Lab) -> None:
    same = dk.compare([lab.delta, dk.truncate(lab.delta, 20)]).pairs[0]
    assert (same.total.shared, same.apart, same.base.verdict) == (20, "", "same")
    for other in (lab.file.with_name("b.sdelta"), lab.other):
        found = dk.compare([lab.file, other])
        assert found.pairs[0].apart and not found.pairs[0].tensors and len(found.notes) == 2
        folded = [
            np.concatenate(
                [
                    (v["lora_B.weight"] @ v["lora_A.weight"]).reshape(-1)
                    for v in values_of(d).values()
                ]
            )
            for d in (lab.delta, lab.other)
        ]
        lengths = [np.linalg.norm(f) for f in folded]
        expected = folded[0] @ folded[1] / lengths[0] / lengths[1]
        assert found.pairs[0].folded_cosine == pytest.approx(expected, rel=1e-4)
    assert dk.compare([lab.delta, lab.plain]).pairs[0].apart


def works_inspect(lab: Lab) -> None:
    found = dk.inspect(lab.file)
    told = found.as_dict()
    assert (told["format_version"], told["entries"]) == (2, lab.delta.nnz)
    adapter = told["adapter"]
    assert (adapter["kind"], adapter["seed"], adapter["modules"]) == ("lora", 3, ["m", "n"])
    assert adapter["weights"] == 192 and adapter["kept"] == lab.delta.nnz / 192
    assert list(adapter["stands_at"]) == ["m.weight", "n.weight"]
    assert json.loads(json.dumps(adapter)) == replace(found, remote=True).as_dict()["adapter"]


def works_verify(lab: Lab) -> None:
    for base in (None, lab.base):
        assert dk.verify(lab.file, base).ok
    assert lab.delta.adapter is not None
    dk.save(replace(lab.delta, adapter=replace(lab.delta.adapter, seed=8)), lab.folder / "w.sdelta")
    assert "check value" in dk.verify(lab.folder / "w.sdelta").problems[0]
    moved = write_safetensors(
        lab.folder / "other.safetensors", {"m.weight": lab.weights, "n.weight": lab.weights}
    )
    assert "'m.weight' has other values" in dk.verify(lab.file, moved).problems[0]
    dora = {**FACTORS, "lora_magnitude_vector.weight": (10,)}
    dk.save(adapter_on(lab.base, {"m": dora}, "dora"), lab.folder / "d.sdelta")
    assert dk.verify(lab.folder / "d.sdelta", lab.base).ok
    assert "need the base" in dk.verify(lab.folder / "d.sdelta").notes[0]


def works_distances(lab: Lab) -> None:
    """From the adapter's initial values, by its own tensors."""
    found = dk.distances(lab.delta)
    assert found.keys() == lab.delta.tensors.keys()


def works_history(lab: Lab) -> None:
    assert dk.unmasking_history(lab.delta).names == tuple(lab.delta.tensors)


def works_files(lab: Lab) -> None:
    assert dk.load(lab.file).equals(lab.delta)


def live(lab: Lab) -> Any:
    """The base as a model."""
    import torch

    model = torch.nn.ModuleDict({m: torch.nn.Linear(14, 10, bias=False) for m in "mn"})
    base = Checkpoint(lab.base)
    weights = {name: torch.from_numpy(array_of(base, name)) for name in base.names}
    model.load_state_dict(weights)
    return model


def works_live(lab: Lab) -> None:
    import torch

    model, inputs = live(lab), torch.linspace(-1, 1, 28).reshape(2, 14)
    before = model["m"](inputs)
    with dk.applied(model, [lab.delta]), torch.no_grad():
        inside = model["m"](inputs)
    values = values_of(lab.delta)["m"]
    change = naive_product(values["lora_B.weight"], values["lora_A.weight"]) * np.float32(1.5)
    expected = before + inputs @ torch.from_numpy(change).T
    assert torch.allclose(inside, expected, rtol=1e-4, atol=1e-5)
    handle = dk.apply(model, lab.delta)
    handle.revert()
    assert torch.equal(model["m"](inputs), before)


def refused(match: str, call: Callable[[Lab], object]) -> Callable[[Lab], None]:
    def check(lab: Lab) -> None:
        with pytest.raises(DeltakitError, match=match) as caught:
            call(lab)
        assert "\n" not in str(caught.value) and "adapter" in str(caught.value)

    return check


WORKS: dict[str, Callable[[Lab], None]] = {
    "add": refused("--weights", lambda lab: dk.add(lab.delta, lab.plain)),
    "applied": works_live,
    "apply": works_live,
    "compare": works_compare,
    "compose": refused(
        "not defined for deltas of adapters", lambda lab: dk.compose([lab.delta] * 2)
    ),
    "convert": refused(
        "adapter", lambda lab: dk.convert(lab.file, lab.folder / "o", to_format="spiel")
    ),
    "DeltaBank": refused("dk.apply", lambda lab: dk.DeltaBank(live(lab), {"a": lab.delta})),
    "distances": works_distances,
    "inspect": works_inspect,
    "intersect": works_intersect,
    "load": works_files,
    "merge": works_merge,
    "merge_in_place": refused(
        "leave out --in-place", lambda lab: dk.merge_in_place(lab.base, lab.delta)
    ),
    "rebase": refused("initial ones", lambda lab: dk.rebase(lab.delta, lab.base, "set")),
    "restrict": works_restrict,
    "save": works_files,
    "scale": refused("--weights", lambda lab: dk.scale(lab.delta, 0.5)),
    "SparseDelta": works_files,
    "stack": refused("--weights", lambda lab: dk.stack([lab.delta, lab.other])),
    "subtract": refused("--weights", lambda lab: dk.subtract(lab.delta, lab.other)),
    "to_scipy": refused("deltakit merge", lambda lab: dk.to_scipy(lab.delta)),
    "to_torch": refused("deltakit merge", lambda lab: dk.to_torch(lab.delta)),
    "to_vllm": refused("deltakit convert", lambda lab: dk.to_vllm(lab.delta, lab.base)),
    "truncate": works_truncate,
    "tune_weights": refused(
        "--weights",
        lambda lab: dk.tune_weights([lab.delta], model=lab.base, data="none", task="causal-lm"),
    ),
    "unmasking_history": works_history,
    "verify": works_verify,
}
ELSEWHERE = {  # public, and told by other tests, or not about deltas that are given
    *("BaseIdentity", "Batches", "BernoulliMask", "BlockMask", "ColumnMask", "DeltakitError"),
    *("DropAndGrow", "Fingerprint", "HeadMask", "ID3", "Increment", "NMMask", "PatchStream"),
    *("RandomMask", "Repeat", "RowMask", "Static", "TensorDelta", "WeightPatch"),
    *("attach", "chain_position", "diff", "find_lr", "from_scipy", "from_torch", "guard", "revert"),
    *("state_digest", "pull", "push"),  # files as they are
    *("SparseTrainer", "SparseTuner", "UserMask", "train"),  # test_adapter_training
    "evaluate",  # test_adapter_apply
}


@pytest.mark.parametrize("name", WORKS)
def test_public_functions_know_deltas_of_adapters(lab: Lab, name: str) -> None:
    WORKS[name](lab)


def test_every_public_name_is_in_the_table() -> None:
    assert not WORKS.keys() & ELSEWHERE
    assert WORKS.keys() | ELSEWHERE == set(dk.__all__) - {"__version__"}


# command -> (arguments, exit code, what it says)
COMMAND_TABLE: dict[str, list[tuple[list[str], int, str]]] = {
    "inspect": [(["a.sdelta"], 0, "lora at 2 modules"), (["a.sdelta", "--json"], 0, '"lora"')],
    "truncate": [(["a.sdelta", "--budget", "5%"], 0, "9 of ")],
    "merge": [
        (["base.safetensors", "a.sdelta", "--dry-run"], 0, "would be written"),
        (["base.safetensors", "a.sdelta"], 0, "merged"),
        (["base.safetensors", "a.sdelta", "b.sdelta", "--weights", "0.5,0.5"], 0, "merged"),
        (["base.safetensors", "a.sdelta", "--in-place"], 1, "leave out --in-place"),
        (
            ["base.safetensors", "a.sdelta", "b.sdelta", "--method", "ties", "-o", "t"],
            1,
            "--weights W,...",
        ),
    ],
    "stack": [(["a.sdelta", "b.sdelta", "-o", "s.sdelta"], 1, "--weights W,...")],
    "compare": [(["a.sdelta", "b.sdelta"], 0, "not compared entry by entry")],
    "verify": [(["a.sdelta", "--base", "base.safetensors"], 0, "sound, and base.safetensors is")],
    "convert": [(["a.sdelta", "o", "--to", "spiel"], 1, "adapter")],
    "diff": [(["base.safetensors", "a.sdelta", "-o", "d.sdelta"], 1, "a.sdelta")],
}
OTHER_COMMANDS = {
    *("demo", "sweep", "lr-find", "revert", "completion"),  # take no deltas
    *("pull", "push"),  # files as they are
    *("train", "evaluate"),  # test_adapter_training, test_adapter_apply
}


@pytest.mark.parametrize("command", COMMAND_TABLE)
def test_commands_know_deltas_of_adapters(
    lab: Lab, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lab.folder)
    for arguments, code, told in COMMAND_TABLE[command]:
        before = {path: path.read_bytes() for path in lab.folder.iterdir()}
        result = CliRunner().invoke(main, [command, *arguments])
        assert (result.exit_code, told in result.output) == (code, True), result.output
        if code:
            assert result.stderr.strip().count("\n") == 0
            assert {path: path.read_bytes() for path in lab.folder.iterdir()} == before


def test_every_command_is_in_the_table() -> None:
    assert COMMAND_TABLE.keys() | OTHER_COMMANDS == COMMANDS.keys()


def test_deltas_of_adapters_and_of_weights_tell_whether_they_share_a_base(lab: Lab) -> None:
    at = {"m.weight": lab.plain.tensors["m.weight"].indices}
    plain = replace(lab.plain, base=identify(Checkpoint(lab.base), at))
    assert base_agreement(lab.delta, plain).verdict == "same"
    assert base_agreement(plain, lab.other).verdict == "same"
    moved = {"m.weight": lab.weights, "n.weight": lab.weights}
    other = Checkpoint(write_safetensors(lab.folder / "o.safetensors", moved))
    assert (
        base_agreement(lab.delta, replace(plain, base=identify(other, at))).verdict == "different"
    )
