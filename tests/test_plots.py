"""Figures are files that every viewer opens, whose text is text and whose bytes are decided."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from deltakit.cli.main import main
from deltakit.delta import SparseDelta, TensorDelta
from deltakit.errors import ConfigError
from deltakit.formats.sdelta import save
from deltakit.inspection import inspect
from deltakit.views.delta_view import DeltaView
from deltakit.views.labels import WIDTH, shortened

pytest.importorskip("matplotlib")

from deltakit.figures import check_figure, drawn
from deltakit.heat_map import heat_map
from deltakit.views.plot import draw_unmasking, plot_delta

KINDS = ("attention.query.weight", "attention.query.bias", "mlp.up.weight")


def texts(path: Path) -> list[str]:
    """All text of an SVG, which is well-formed."""
    root = ElementTree.fromstring(path.read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]


def layers(count: int, order: bool = True) -> SparseDelta:
    """A delta of some layers with three kinds of tensor, and of embeddings without an entry."""
    random = np.random.default_rng(count)
    names = [f"model.layers.{at}.{kind}" for at in range(count) for kind in KINDS]
    tensors = {}
    for name in [*names, "model.embed.weight"]:
        nnz = 0 if "embed" in name else int(random.integers(1, 200))
        tensors[name] = TensorDelta(
            name=name,
            shape=(40, 50),
            dtype="float32",
            mode="add",
            indices=np.sort(random.choice(2000, nnz, replace=False)),
            values=random.standard_normal(nnz) * 1e-3,
            order=random.integers(0, 50, nnz) if order else None,
        )
    return SparseDelta(tensors=tensors)


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `delta.sdelta` and the record of its run, to stand in."""
    save(layers(3), tmp_path / "delta.sdelta")
    final = {"entries": 90, "step": 9, "metrics": {"loss": 0.5}, "path": "delta.sdelta"}
    mark = {"entries": 50, "step": 5, "metrics": {"loss": 0.75}, "path": "budget-50.sdelta"}
    record = {"method": "id3", "task": "news", "metric": "loss", "marks": [mark], "final": final}
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    done = CliRunner().invoke(main, arguments)
    return done.exit_code, done.stdout, done.stderr


def test_inspect_draws_every_figure_as_svg(run_folder: Path) -> None:
    """Axes with their units, layers, kinds and the run's metric are text that a search finds."""
    code, out, err = run("inspect", "delta.sdelta", "--plot", "out.svg")
    assert (code, err) == (0, "Wrote out.svg.\n")
    assert out.startswith("file")
    told = texts(run_folder / "out.svg")
    for label in (
        "kind of tensor (grey: no such tensor, white: no entry)",
        "entries (% of the weights)",
        "mean |change| of a weight",
        "|change| of a weight",
        "entries per bin",
        "training step",
        "budget (entries)",
        "loss (nats)",
        "this delta",
        "layers.2",
        "mlp.up.weight",
    ):
        assert label in told
    nnz = inspect(run_folder / "delta.sdelta").entries
    assert f"delta.sdelta: {nnz:,} entries in 10 tensors" in told


def test_png_by_the_other_suffix(run_folder: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (run_folder / "out.PNG").write_text("an older one")
    assert run("inspect", "delta.sdelta", "--plot", "out.PNG", "--force", "-q")[2] == ""
    with image.open(run_folder / "out.PNG") as opened:
        opened.load()
        assert opened.format == "PNG"
        assert min(opened.size) > 600


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_equal_drawings_give_equal_bytes(tmp_path: Path, suffix: str) -> None:
    """Whatever the user's own settings of matplotlib are, which stay as they are."""
    import matplotlib

    def draw(path: Path) -> bytes:
        with drawn(path, 5, 2, 2) as [left, right]:
            heat_map(left, np.array([[0.01, 1.0]]), ["a"], ["b", "c"], "density (%)")
            draw_unmasking(right, [0, 4], {"a": [0, 5], "b": [1, 2]})
        return path.read_bytes()

    first = draw(tmp_path / f"a{suffix}")
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 20, "svg.fonttype": "path"}):
        assert draw(tmp_path / f"b{suffix}") == first
        assert matplotlib.rcParams["font.size"] == 20


@pytest.mark.parametrize("count", [6, 80])
def test_every_layer_has_its_label(tmp_path: Path, count: int) -> None:
    save(layers(count, order=False), tmp_path / "d.sdelta")
    found = inspect(tmp_path / "d.sdelta")
    plot_delta(found, DeltaView.of(found), tmp_path / "out.svg")
    told = texts(tmp_path / "out.svg")
    for at in range(count):
        assert told.count(f"layers.{at}") == 2  # of density and of change
    assert "training step" not in told  # no order, and no run beside it
    assert "budget (entries)" not in told


def test_a_header_alone_and_an_empty_delta_are_drawn(tmp_path: Path) -> None:
    """Of what is on the Hub, density alone."""
    for name, delta in [("some", layers(2)), ("none", SparseDelta(tensors={}))]:
        save(delta, tmp_path / f"{name}.sdelta")
        for remote in (True, False):
            found = replace(inspect(tmp_path / f"{name}.sdelta"), remote=remote)
            plot_delta(found, DeltaView.of(found), tmp_path / "out.svg")
            told = texts(tmp_path / "out.svg")
            assert "entries (% of the weights)" in told
            assert ("entries per bin" in told) is not remote


def test_names_are_no_formulas(tmp_path: Path) -> None:
    """Of files and of tensors: dollars, tags and letters that the font lacks."""
    name = "model.0.$\\frac{a}<script>$语言"
    tensor = TensorDelta(
        name=name, shape=(3,), dtype="float32", mode="add", indices=[1], values=[2.0]
    )
    save(SparseDelta(tensors={name: tensor}), tmp_path / "$a_b$.sdelta")
    found = inspect(tmp_path / "$a_b$.sdelta")
    plot_delta(found, DeltaView.of(found), tmp_path / "out.svg")
    told = texts(tmp_path / "out.svg")
    assert "$a_b$.sdelta: 1 entry in 1 tensor" in told
    assert told.count("$\\frac{a}<script>$语言") == 2


@pytest.mark.parametrize("command", ["inspect", "compare"])
@pytest.mark.parametrize("name", ["out.pdf", "out"])
def test_other_suffixes_are_refused_before_anything_is_read(
    run_folder: Path, command: str, name: str
) -> None:
    """Even before a delta that is damaged is found to be so."""
    (run_folder / "bad.sdelta").write_bytes(b"none")
    deltas = ["bad.sdelta"] * (1 if command == "inspect" else 2)
    found = "ends in .pdf" if "." in name else "has no ending"
    told = f"Error: {name}: the name of a figure ends in .png or .svg; this one {found}\n"
    assert run(command, *deltas, "--plot", name) == (1, "", told)
    assert not (run_folder / name).exists()


def test_a_figure_that_exists_is_kept(run_folder: Path) -> None:
    target = run_folder / "out.svg"
    target.write_text("mine")
    code, out, err = run("inspect", "delta.sdelta", "--plot", "out.svg")
    told = "Error: out.svg exists; give another output or --force to replace it\n"
    assert (code, out, err) == (1, "", told)
    assert target.read_text() == "mine"


def test_without_matplotlib_one_line_tells_how_to_get_it(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is read."""
    for name in [*(n for n in sys.modules if n.startswith("matplotlib.")), "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    code, out, err = run("inspect", "absent.sdelta", "--plot", "out.png")
    assert (code, out) == (1, "")
    assert err == (
        "Error: this needs matplotlib, which is not installed; "
        "pip install 'deltakit-sparse[plot]'\n"
    )


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_nothing_is_left_when_drawing_fails(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ZeroDivisionError), drawn(tmp_path / f"a{suffix}", 2, 2) as [panel]:
        panel.plot([1, 2])
        raise ZeroDivisionError
    with (
        pytest.raises(ValueError, match="outside 0-1"),
        drawn(tmp_path / f"a{suffix}", 2, 2) as [panel],
    ):
        panel.plot([1, 2], alpha=7)  # refused by matplotlib
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r"ends in \.jpg"):
        check_figure(tmp_path / "a.jpg")


def test_series_differ_without_colour(tmp_path: Path) -> None:
    """No two of many lines share dash, marker and colour, and neighbours differ in grey as well."""
    with drawn(tmp_path / "a.svg", 4, 3, [1, 2], [1, 2]) as axes:
        assert len(axes) == 3
        lines = [axes[0].plot([0, 1])[0] for _ in range(60)]
        styles = [(line.get_linestyle(), line.get_marker()) for line in lines]
        colours = [line.get_color() for line in lines]
    assert len(set(zip(styles, colours, strict=True))) == 60
    assert all(a != b for a, b in pairwise(styles))
    assert "#F0E442" not in colours  # yellow on white


def test_kinds_that_are_many_are_drawn_together(tmp_path: Path) -> None:
    """And all entries are in the lines."""
    kinds = {f"layer.*.{letter}": np.array([1, at]) for at, letter in enumerate("abcdefghijk", 1)}
    with drawn(tmp_path / "a.svg", 6, 3) as [panel]:
        draw_unmasking(panel, [0, 4], kinds)
        ends = [line.get_ydata()[-1] for line in panel.lines]
    assert sum(ends) == sum(range(12))
    told = texts(tmp_path / "a.svg")
    assert {"k", "e", "4 other kinds"} < set(told)
    assert "d" not in told


def test_colours_of_a_matrix(tmp_path: Path) -> None:
    """Logarithmic where values differ by a factor of ten; zeros and unknown ones stand apart."""
    matrix = np.array([[0.0, 1.0], [100.0, np.nan]])
    with drawn(tmp_path / "a.svg", 4, 3, 2) as [left, right]:
        heat_map(left, matrix, ["a", "b"], ["c", "d"], "entries")
        image = left.collections[0]
        assert image.get_clim() == (1.0, 100.0)
        low, high = image.to_rgba([1.0, 100.0])
        assert not np.array_equal(low, high)
        assert image.to_rgba([0.5])[0].tolist() == [1, 1, 1, 1]  # where zeros are put: white
        assert image.get_array().mask.ravel().tolist() == [False, False, False, True]
        heat_map(right, matrix / 100 + 5, ["a", "b"], ["c", "d"], "entries")
        assert right.collections[0].get_clim() == (0.0, 6.0)
    assert {"1", "10", "100", "a", "d", "entries"} <= set(texts(tmp_path / "a.svg"))


@pytest.mark.parametrize(
    ("names", "short"),
    [
        ([], []),
        (["model.layers.7"], ["model.layers.7"]),
        (["model.layers.0", "model.layers.1"], ["layers.0", "layers.1"]),
        (["model.layers.0", "model.layers.1", "model.norm"], ["layers.0", "layers.1", "norm"]),
        (
            ["encoder.layer.*.attention.self.query.weight", "pooler.bias"],
            ["…*.attention.self.query.weight", "pooler.bias"],
        ),
        (["x" * 40, "y"], ["…" + "x" * 40, "y"]),
    ],
)
def test_names_are_shortened(names: list[str], short: list[str]) -> None:
    assert shortened(names) == short


def test_shortened_names_stay_apart() -> None:
    ends = ".block.*.layer.*.SelfAttention.query.weight"
    assert shortened([f"encoder{ends}", f"decoder{ends}"]) == [f"encoder{ends}", f"decoder{ends}"]
    assert len(f"encoder{ends}") > WIDTH
