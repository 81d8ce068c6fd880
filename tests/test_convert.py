"""Converting as a user does it: formats told by content, names found in the base, nothing lost
unsaid, nothing overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import deltakit as dk
from deltakit.cli.main import main
from deltakit.errors import (
    ConfigError,
    CoordinateError,
    FormatError,
    MissingFileError,
    OutputError,
    OutputExistsError,
)
from deltakit.formats.bridges import BRIDGES, Bridge, recognise
from deltakit.formats.bridges.names import checkpoint_names
from deltakit.formats.checkpoint import Checkpoint

RANK = 2


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in the folder of the files, so that messages hold short names."""
    monkeypatch.chdir(tmp_path)


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `deltakit ARGUMENTS`, in this process."""
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA adapter of the base `base.safetensors` (layers `l.0` and `l.1` of 4 by 6), as PEFT
    saves one."""
    random = np.random.default_rng(0)
    weights = {f"l.{n}.weight": random.standard_normal((4, 6), np.float32) for n in (0, 1)}
    save_file(weights, tmp_path / "base.safetensors")
    arrays = {}
    for n in (0, 1):
        key = f"base_model.model.l.{n}.lora"
        arrays[f"{key}_A.weight"] = random.standard_normal((RANK, 6), np.float32)
        arrays[f"{key}_B.weight"] = random.standard_normal((4, RANK), np.float32)
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file(arrays, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_the_command_tells_what_it_found_and_kept(lora: Path) -> None:
    code, out, err = run("convert", lora.name, "d.sdelta", "--base", "base.safetensors", "-b", "10")
    assert (code, err) == (0, "lora: PEFT LoRA adapter, 2 modules\n")
    report = dk.convert(lora, "e.sdelta", base="base.safetensors", budget=10)
    assert out == f"d.sdelta: sdelta of 10 entries, {report.retained:.2%} of the change's energy\n"
    assert Path("d.sdelta").read_bytes() == Path("e.sdelta").read_bytes()


def test_energy_by_tensor(lora: Path) -> None:
    args = ["convert", lora.name, "d.sdelta", "--base", "base.safetensors", "--density", "0.5"]
    code, out, _ = run(*args, "--tensors")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == [
        "tensor",
        "l.0.weight",
        "l.1.weight",
    ]
    code, out, _ = run(*args, "--force", "--json")
    told = json.loads(out)
    assert (told["from"], told["to"], told["entries"]) == ("peft-lora", "sdelta", 24)
    shares = told["retained_energy_by_tensor"]
    assert list(shares) == ["l.0.weight", "l.1.weight"]
    assert min(shares.values()) < told["retained_energy"] < max(shares.values())


def test_the_list_of_formats() -> None:
    code, out, _ = run("convert", "--formats")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["format", *BRIDGES.names()]


def test_the_page_about_formats_knows_them_all() -> None:
    page = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    for record in BRIDGES:
        ways = {True: "yes", False: ""}
        reads, writes = (
            ways[getattr(record.target, way) is not getattr(Bridge, way)]
            for way in ("read", "write")
        )
        assert f"| `{record.name}` | {reads} | {writes} |" in page


@pytest.mark.parametrize("bytes_left", [60, 300, -1])
@pytest.mark.parametrize(("name", "form"), [("d.sdelta", "sdelta"), ("d.wsp", "weightscope")])
def test_a_truncated_file_is_told_as_such(
    name: str, form: str, bytes_left: int, delta_file: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """And not as one of no known format."""
    source, out = tmp_path / name, tmp_path / "out.safetensors"
    if form == "sdelta":
        source.write_bytes(delta_file.read_bytes())
    else:
        dk.convert(delta_file, source, to_format=form, base=checkpoint)
    source.write_bytes(source.read_bytes()[:bytes_left])
    assert recognise(source)[0] == form
    with pytest.raises(FormatError, match=rf"{name}.*(truncat|damaged|cut|file has|end)"):
        dk.convert(source, out, to_format="coo-safetensors", base=checkpoint)
    assert not out.exists()


def test_every_bridge_has_its_registered_name_and_a_way() -> None:
    for record in BRIDGES:
        assert record.target.name == record.name
        assert record.summary
        ways = (record.target.read, record.target.write)
        assert ways != (Bridge.read, Bridge.write)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\x80\x04.", b"PK\x03\x04", bytes(100), b"\xff" * 9]
)
def test_unknown_files_are_refused_by_all_bridges(content: bytes, tmp_path: Path) -> None:
    for name in ("adapter_model.bin", "x.safetensors", "pytorch_diff.bin", "x.wsp", "x"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FormatError, match=r"is of no known format; known: "):
            recognise(tmp_path / name)
    with pytest.raises(FormatError, match=r"is of no known format"):
        recognise(tmp_path)
    with pytest.raises(MissingFileError, match=r"nowhere does not exist"):
        recognise("nowhere")


def test_what_must_be_said(lora: Path, delta_file: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"an sdelta can become adapter-modules, coo-safetensors, .*\(--to\)"
    ):
        dk.convert(delta_file, "out")
    with pytest.raises(ConfigError, match="unknown format 'peft-lore'; nearest: peft-lora"):
        dk.convert(delta_file, "out", to_format="peft-lore")
    with pytest.raises(ConfigError, match="format peft-lora can only be read"):
        dk.convert(delta_file, "out", to_format="peft-lora")
    with pytest.raises(ConfigError, match="sdelta is sparse as it is"):
        dk.convert(delta_file, "out", to_format="coo-safetensors", budget=3)


def test_nothing_is_overwritten(lora: Path, delta_file: Path, tmp_path: Path) -> None:
    (tmp_path / "d.sdelta").write_bytes(b"kept")
    with pytest.raises(OutputExistsError, match="exists"):
        dk.convert(lora, "d.sdelta", budget=3)
    assert (tmp_path / "d.sdelta").read_bytes() == b"kept"
    dk.convert(lora, "d.sdelta", budget=3, force=True)
    with pytest.raises(OutputError, match="is the input"):
        dk.convert("d.sdelta", "d.sdelta", to_format="coo-safetensors", force=True)

    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis").write_bytes(b"kept")
    with pytest.raises(OutputError, match=r"is not replaced: .* is of no known format"):
        dk.convert("d.sdelta", "documents", to_format="peft-shira", force=True, lossy=True)
    assert (tmp_path / "documents" / "thesis").read_bytes() == b"kept"
    dk.convert("d.sdelta", "lora", to_format="peft-supertuning", force=True)
    assert recognise("lora")[0] == "peft-supertuning"


def test_a_file_of_the_adapter_stands_for_its_folder(lora: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert recognise(lora / name) == ("peft-lora", "PEFT LoRA adapter, 2 modules")


def base_of(*names: str) -> Checkpoint:
    save_file({name: np.zeros(2, np.float32) for name in names}, "names.safetensors")
    return Checkpoint("names.safetensors")


def test_names_of_live_models() -> None:
    """One prefix for all, taken off or put before, where the base lacks a name."""
    inner = base_of("layers.0.q.weight", "layers.1.q.weight", "norm.weight")
    live = ["model.layers.0.q.weight", "model.layers.1.q.weight"]
    found = checkpoint_names(live, inner, ["model.norm.weight", "head.weight"])
    assert list(found.values()) == [*inner.names[:2], "norm.weight", "head.weight"]
    assert checkpoint_names(inner.names, inner) == {name: name for name in inner.names}
    outer = base_of("bert.layers.0.q.weight", "cls.weight")
    assert checkpoint_names(["layers.0.q.weight", "cls.weight"], outer) == {
        "layers.0.q.weight": "bert.layers.0.q.weight",
        "cls.weight": "cls.weight",
    }
    assert checkpoint_names(["any.weight"], None) == {"any.weight": "any.weight"}


def test_names_that_cannot_be_told() -> None:
    two = base_of("encoder.0.q.weight", "decoder.0.q.weight")
    with pytest.raises(CoordinateError, match=r"could be 'decoder.0.q.weight' or 'encoder"):
        checkpoint_names(["0.q.weight"], two)
    with pytest.raises(CoordinateError, match=r"no tensor 'x.0.q.weight', .*; nearest: "):
        checkpoint_names(["x.0.q.weight"], two)
    with pytest.raises(CoordinateError, match=r"are both 'decoder.0.q.weight'"):
        checkpoint_names(["decoder.0.q.weight", "m.decoder.0.q.weight"], two)
    with pytest.raises(CoordinateError, match=r"with or without a prefix"):
        checkpoint_names(["model.encoder.0.q.weight", "model.0.q.weight"], two)
