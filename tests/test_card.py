"""The card of a repository: metadata that the Hub reads, figures that hold, nothing of strangers."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import deltakit as dk
from deltakit.errors import ConfigError, FormatError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.publishing.card import card_text
from deltakit.publishing.card_previous import END, KEEP, KEPT, Previous, begin, taken_apart
from deltakit.publishing.markdown import code, table

MARKDOWN = MarkdownIt("commonmark").enable("table")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HOSTILE = [
    "a|b\n| c | d |",
    "`</code><script>alert(1)</script>",
    f"\n{END}\n# mine",
    "![x](http://evil/x.png)",
    "\u202egnp.exe",
    "\\|" * 5,
    "x" * 10_000,
    " ",
]


@pytest.fixture
def family(tmp_path: Path, delta_file: Path) -> dict[str, Path]:
    """`delta_file` of 110 entries, and checkpoints of 60 and 30 entries of the same run."""
    delta = dk.load(delta_file)
    assert delta.base is not None
    delta = replace(
        delta,
        base=replace(delta.base, revision=COMMIT),
        provenance={
            "tool": "deltakit 0.1.0",
            "task": "causal-lm",
            "data": "org/articles",
            "seed": 7,
            "method": "id3",
        },
    )
    files = {"delta.sdelta": tmp_path / "delta.sdelta"}
    dk.save(delta, files["delta.sdelta"])
    for count in (60, 30):
        name = f"budget-{count}.sdelta"
        files[name] = tmp_path / name
        dk.save(dk.truncate(delta, count, by="order"), files[name])
    return files


def measured(files: dict[str, Path]) -> dict[str, Any]:
    """A metrics.json of a run that wrote these files."""

    def result(name: str, loss: float) -> dict[str, Any]:
        size = files[name].stat().st_size
        return {"path": name, "bytes": size, "step": 3, "metrics": {"loss": loss}}

    marks = [{"entries": n, **result(f"budget-{n}.sdelta", 2.0 + n / 300)} for n in (30, 60)]
    final = {"entries": 110, **result("delta.sdelta", 1.0625)}
    splits = {"how": "given", "validation_rows": 1234}
    return {"version": 1, "task": "causal-lm", "marks": marks, "final": final, "splits": splits}


def card(files: dict[str, Path], **options: Any) -> str:
    """The card of `org/news` and, as a law, the same card again from itself."""
    given: dict[str, Any] = {"metrics": None, "settings": None, "previous": None, **options}
    text = card_text(files, repo_id="org/news", **given)
    assert card_text(files, repo_id="org/news", **{**given, "previous": text}) == text
    return text


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, as a reader sees them."""
    tokens = MARKDOWN.parse(text[text.index(f"\n{heading}\n") :])
    start = next(at for at, token in enumerate(tokens) if token.type == "table_open")
    stop = next(at for at, token in enumerate(tokens) if token.type == "table_close")
    found: list[list[str]] = []
    for token in tokens[start:stop]:
        if token.type == "tr_open":
            found.append([])
        elif token.type == "inline":
            found[-1].append("".join(child.content for child in token.children or []))
    return found


def test_metadata(family: dict[str, Path]) -> None:
    settings = {"validation_split": "test"}
    data = ModelCard(card(family, metrics=measured(family), settings=settings)).data
    told = data.to_dict()
    told.pop("model-index")
    assert told == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "deltakit",
        "pipeline_tag": "text-generation",
        "datasets": ["org/articles"],
        "tags": ["deltakit", "sparse-fine-tuning"],
    }
    [result] = data.eval_results
    assert (result.metric_type, result.metric_value) == ("loss", 1.0625)
    assert (result.dataset_type, result.dataset_split) == ("org/articles", "test")


def test_budgets_against_metrics(family: dict[str, Path]) -> None:
    found = rows(card(family, metrics=measured(family)), "## Files")
    assert [row[0] for row in found] == [
        "file",
        "budget-30.sdelta",
        "budget-60.sdelta",
        "delta.sdelta",
    ]
    assert [row[1] for row in found[1:]] == ["30", "60", "110"]
    assert [row[2] for row in found] == ["loss", "2.1000", "2.2000", "1.0625"]
    for name, *_, sha256 in found[1:]:
        assert sha256 == hashlib.sha256(family[name].read_bytes()).hexdigest()


def test_metrics_of_other_files_are_not_taken(family: dict[str, Path]) -> None:
    """Such as those of the run that wrote files of the same names before."""
    record = measured(family)
    dk.save(dk.truncate(dk.load(family["budget-60.sdelta"]), 59), family["budget-60.sdelta"])
    family["other.sdelta"] = family.pop("budget-30.sdelta").rename(
        family["delta.sdelta"].with_name("other.sdelta")
    )
    found = rows(card(family, metrics=record), "## Files")
    assert [row[2] for row in found] == ["loss", "", "", "1.0625"]


@pytest.mark.parametrize("record", [{}, {"marks": 3, "final": [], "splits": "x", "versions": 1}])
def test_records_of_other_forms(family: dict[str, Path], record: dict[str, Any]) -> None:
    assert ModelCard(card(family, metrics=record)).data.eval_results is None


def test_figures_by_part(tmp_path: Path) -> None:
    shapes = {
        "model.embed_tokens.weight": (10, 4),
        "model.layers.0.self_attn.q_proj.weight": (4, 4),
        "model.layers.0.self_attn.q_proj.bias": (4,),
        "model.layers.0.mlp.up_proj.weight": (8, 4),
        "model.layers.1.mlp.up_proj.weight": (8, 4),
    }
    tensors = {}
    for name, shape in shapes.items():
        values = np.array([0.5, -1.5], np.float32)
        tensors[name] = dk.TensorDelta(
            name=name, shape=shape, dtype="float32", mode="add", indices=[0, 3], values=values
        )
    dk.save(dk.SparseDelta(tensors=tensors), tmp_path / "a.sdelta")
    text = card({"a.sdelta": tmp_path / "a.sdelta"})
    second = text[text.index("| part |") :]
    assert rows("\n## x\n\n" + second, "## x")[1:] == [
        ["attention", "1", "2", "20 %", "12.5 %", "1", "1.5"],
        ["feed-forward", "2", "4", "40 %", "6.25 %", "1", "1.5"],
        ["embeddings", "1", "2", "20 %", "5 %", "1", "1.5"],
        ["biases", "1", "2", "20 %", "50 %", "1", "1.5"],
    ]


def test_a_delta_with_nothing_recorded(tmp_path: Path) -> None:
    dk.save(dk.SparseDelta(tensors={}), tmp_path / "a.sdelta")
    text = card({"a.sdelta": tmp_path / "a.sdelta"})
    assert set(ModelCard(text).data.to_dict()) == {"library_name", "tags"}
    assert "records nothing about how it was made" in text
    assert "deltakit merge base hf://org/news/a.sdelta" in text


@pytest.mark.parametrize(
    "name", ["bert", "runs/deep/er", "C:\\bert", "../base", "a@b/c", "a/b@c", None]
)
def test_a_base_that_is_not_on_the_hub(family: dict[str, Path], name: str | None) -> None:
    delta = dk.load(family["delta.sdelta"])
    assert delta.base is not None
    local = replace(delta, base=replace(delta.base, model_id=name, revision=None))
    dk.save(local, family["delta.sdelta"])
    data = ModelCard(card(family)).data
    assert data.base_model is None
    assert data.get("base_model_relation") is None


def test_no_folders_of_the_maker(family: dict[str, Path], tmp_path: Path) -> None:
    delta = dk.load(family["delta.sdelta"])
    told = {
        "model": str(tmp_path / "bert"),
        "note": "made in /home/me/private of C:\\Users\\me\\x",
        "lineage": [{"operation": "stack", "with": "~/private/other.sdelta"}],
    }
    assert delta.base is not None
    base = replace(delta.base, model_id="/home/me/private/bert", revision=None)
    dk.save(replace(delta, provenance=told, base=base), family["delta.sdelta"])
    settings = {"output_dir": str(tmp_path / "run"), "data": "file:///home/me/private/x.jsonl"}
    text = card(family, settings=settings)
    assert "bert" in text
    for secret in (str(tmp_path), "/home", "private/", "Users", "~/"):
        assert secret not in text


@pytest.mark.parametrize("hostile", HOSTILE)
def test_words_of_strangers_stay_words(
    tmp_path: Path, checkpoint: Checkpoint, hostile: str
) -> None:
    """As every name and every value that a file can hold; the card's structure stays the same."""

    def written(word: str) -> str:
        tensor = dk.TensorDelta(
            name=word, shape=(4,), dtype="float32", mode="add", indices=[1], values=np.ones(1)
        )
        delta = dk.SparseDelta(
            tensors={word: tensor},
            extras={f"x{word}": np.zeros(2, np.float32)},
            base=dk.BaseIdentity(model_id=word, revision=word),
            config={word: word},
            provenance={word: word, "task": word, "data": word, "lineage": [{word: word}]},
        )
        dk.save(delta, tmp_path / "a.sdelta")
        metrics = {"final": {"path": "a.sdelta", "metrics": {word: 0.5}}, "splits": {"how": word}}
        metrics["final"]["bytes"] = (tmp_path / "a.sdelta").stat().st_size
        return card({"a.sdelta": tmp_path / "a.sdelta"}, metrics=metrics, settings={word: word})

    ours, theirs = written("word"), written(hostile)
    assert _structure(theirs) == _structure(ours)
    assert "\u202e" not in theirs
    assert len(theirs) < len(ours) + 20 * 2000


def _structure(text: str) -> list[str]:
    """All that Markdown makes of a card: its blocks, and markup inside them that is not code."""
    ModelCard(text)
    found = []
    for token in MARKDOWN.parse(text[text.index("\n---\n") + 5 :]):
        if token.type == "html_block":
            assert token.content.startswith("<!-- ")
        found.append(token.type)
        for child in token.children or []:
            if child.type == "html_inline":
                assert child.content in ("<code>", "</code>")
            else:
                assert child.type in ("text", "code_inline", "softbreak")
    return found


@given(st.text())
def test_code_is_one_cell_that_shows_the_text(text: str) -> None:
    html = MARKDOWN.render(table([["a", "b"], [code(text), "next"]]))
    [cell] = html.split("<td>")[1:2]
    assert cell.startswith("<code>")
    assert html.count("<td>") == 2
    assert html.count("<code>") == html.count("</code>") == 1


def test_what_people_wrote_is_kept(family: dict[str, Path]) -> None:
    first = card(family)
    theirs = first.replace("---\n", "---\n# ours\nlicense: mit  # of the base\nlanguage: no\n", 1)
    theirs = theirs.replace("- deltakit\n", "- deltakit\n- newspapers\n")
    theirs = theirs.replace(f"{KEEP}\n", f"{KEEP}\nUse it *well*.\n\n| a |\n")
    start = theirs.index("<!-- deltakit: begin")
    theirs = theirs[:start] + "> before\n\n" + theirs[start:] + "\nafter\n"
    again = card(family, metrics=measured(family), previous=theirs)
    assert again != theirs
    data = ModelCard(again).data
    assert (data.license, data.base_model) == ("mit", "org/base")
    assert data.tags == ["deltakit", "sparse-fine-tuning", "newspapers"]
    assert data.eval_results
    assert "\n# ours\nlicense: mit  # of the base\nlanguage: no\n" in again
    assert f"{KEEP}\nUse it *well*.\n\n| a |\n" in again
    assert "\n> before\n\n<!-- deltakit: begin" in again
    assert again.endswith(f"{END}\n\nafter\n")
    assert card(family, previous=theirs.replace("\n", "\r\n")) == card(family, previous=theirs)


@given(st.tuples(*[st.text() for _ in range(4)]), st.lists(st.text(min_size=1), max_size=3))
def test_any_text_is_kept(texts: tuple[str, ...], values: list[str]) -> None:
    """To the letter, but for the line ends of Windows."""
    before, kept, more, after = (text.replace("\r\n", "\n") for text in texts)
    metadata = {f"key{n}": yaml.safe_dump({f"key{n}": v}) for n, v in enumerate(values)}
    metadata = {key: text.replace("\r\n", "\n") for key, text in metadata.items()}
    keep = f"{KEEP}\n{kept}\n{KEPT}\n"
    section = f"{begin(['tags'])}\nours\n{keep}ours\n{KEEP}\n{more}\n{KEPT}\n{END}\n"
    front = f"---\ntags: [a]\n{''.join(metadata.values())}---\n"
    found = taken_apart(f"{front}{before}\n{section}{after}")
    assert found == Previous(f"{before}\n", f"{kept}\n{more}\n", after, metadata, ("a",))


def test_a_card_of_others_is_kept_whole(family: dict[str, Path]) -> None:
    theirs = "---\nbase_model: org/other\ntags: [a, b]\nmodel-index: []\n---\n# Ours\n\ntext\n"
    text = card(family, metrics=measured(family), previous=theirs)
    front, body = text.split("\n---\n", 1)
    assert "base_model: org/other\n" in front
    assert front.endswith("model-index: []")
    assert "model_name" not in front
    assert front.count("base_model:") == front.count("model-index:") == 1
    assert ModelCard(text.replace("model-index: []\n", "")).data.tags[-2:] == ["a", "b"]
    assert body.startswith("# Ours\n\ntext\n\n<!-- deltakit: begin")


def test_what_is_no_longer_known_goes(family: dict[str, Path]) -> None:
    """Metadata that deltakit wrote is not taken for that of people."""
    first = card(family)
    delta = dk.load(family["delta.sdelta"])
    dk.save(replace(delta, base=None, provenance={}), family["delta.sdelta"])
    assert set(ModelCard(card(family, previous=first)).data.to_dict()) == {"library_name", "tags"}


@pytest.mark.parametrize(
    ("previous", "message"),
    [
        ("---\na: [\n---\n", r"metadata is no YAML \(line \d\)"),
        ("---\n- a\n---\n", "metadata is no list of keys"),
        ("---\n{a: 1}\n---\n", "metadata is no list of keys"),
        ("---\na: 2024-13-45\n---\n", "no YAML that can be added to"),
        (f"{END}\n", "'<!-- deltakit: end -->' is out of place"),
        ("<!-- deltakit: begin -->\n", "'<!-- deltakit: end -->' is missing"),
        (f"<!-- deltakit: begin -->\n{KEEP}\n{END}\n", "is out of place"),
        (f"<!-- deltakit: begin -->\n{KEEP}\n", f"'{KEPT}' is missing"),
    ],
)
def test_cards_that_cannot_be_kept(family: dict[str, Path], previous: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        card(family, previous=previous)
    assert "mend README.md there, or delete it" in str(caught.value)


def test_a_name_that_is_no_file(family: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="no path"):
        card({"a\n```\nrm -rf.sdelta": family["delta.sdelta"]})


def test_a_damaged_delta(family: dict[str, Path]) -> None:
    data = bytearray(family["delta.sdelta"].read_bytes())
    data[-1] ^= 1
    family["delta.sdelta"].write_bytes(data)
    with pytest.raises(FormatError):
        card(family)


def test_no_torch(family: dict[str, Path]) -> None:
    files = json.dumps({name: str(path) for name, path in family.items()})
    code = (
        "import sys, pathlib\nfrom deltakit.publishing.card import card_text\n"
        f"files = {{k: pathlib.Path(v) for k, v in {files}.items()}}\n"
        "card_text(files, repo_id='org/news', metrics=None, settings=None, previous=None)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
