"""What a run of `deltakit train` leaves, and that its deltas merge to the very model."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_models import colour_rows
from train_lab import ROWS, deltakit, evaluated, metrics, train_flags
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from deltakit.formats.sdelta import load
from deltakit.merging.merge import merge


@pytest.fixture(scope="module")
def run(bert: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two marks."""
    folder = tmp_path_factory.mktemp("out") / "run"
    flags = train_flags(bert, colours, folder, checkpoint_budgets="100,200", unmask_fraction=0.5)
    result = deltakit("train", *flags)
    assert result.exit_code == 0, result.output
    table, _, rest = result.stdout.partition("\nbeside the budget: 51 weights trained densely")
    assert [line.split()[0] for line in table.splitlines()] == ["budget", "100", "200", "300"]
    assert "best accuracy" in rest
    assert "108 train, 12 validation examples (held out by content)" in result.stderr
    assert "budget 100 evaluated: " in result.stderr
    return folder


def test_files_of_a_run(run: Path) -> None:
    """Exactly these, and no checkpoint is left behind."""
    assert sorted(path.name for path in run.iterdir()) == [
        "best.sdelta",
        "budget-100.sdelta",
        "budget-200.sdelta",
        "budget.png",
        "config.yaml",
        "delta.sdelta",
        "density.png",
        "log.jsonl",
        "metrics.json",
        "report.html",
        "run.json",
        "unmasking.png",
    ]
    assert (run / "budget.png").read_bytes().startswith(b"\x89PNG")


def test_budgets_are_exact_and_nested(run: Path) -> None:
    """Marks hold 100 and 200 entries, each within the next."""
    deltas = [load(run / f"{name}.sdelta") for name in ("budget-100", "budget-200", "delta")]
    assert [delta.nnz for delta in deltas] == [100, 200, 300]
    for small, large in pairwise(deltas):
        for name, tensor in small.tensors.items():
            assert set(tensor.indices) <= set(large.tensors[name].indices)


def test_metrics_file(run: Path) -> None:
    """Marks and the end with metric, step, path and size; the best among all; what was used."""
    found = metrics(run)
    assert [mark["entries"] for mark in found["marks"]] == [100, 200]
    assert found["final"]["entries"] == found["budget"]["reached"] == found["budget"]["resolved"]
    for result in (*found["marks"], found["final"], found["best"]):
        assert list(result["metrics"]) == ["accuracy", "macro_f1", "matthews", "loss"]
        assert Path(result["path"]).stat().st_size == result["bytes"]
    assert found["final"]["step"] == found["steps"] == 14
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    values = [r[k] for r in logged for k in ("eval_accuracy", "budget_accuracy") if k in r]
    assert len(values) == 4  # two marks, two epochs
    assert found["best"]["metrics"]["accuracy"] == max(values)
    assert found["extras"] == {"weights": 51, "names": ["classifier.bias", "classifier.weight"]}
    assert found["splits"]["validation_rows"] == 12
    assert found["preset"] == "id3-default"
    assert set(found["versions"]) >= {"deltakit", "torch", "transformers", "python"}


def test_a_run_tells_how_far_its_deltas_went(run: Path) -> None:
    """One distance per file, over the density in all of the base."""
    found = metrics(run)
    rows = found["analyses"]["travelled"]
    assert [row["entries"] for row in rows] == [100, 200, 300]
    assert rows[-1]["density"] == 300 / found["budget"]["base_weights"]
    assert rows[-1]["distance"] == found["analyses"]["distance"]
    assert 0 < rows[0]["distance"] < rows[-1]["distance"]
    assert found["analyses"]["hessian"] == []


def test_a_mask_that_is_missing_leaves_nothing(bert: Path, colours: Path, tmp_path: Path) -> None:
    """What the method needs is read before the folder is made."""
    flags = train_flags(
        bert, colours, tmp_path / "run", method="mask", mask=tmp_path / "none.sdelta"
    )
    result = deltakit("train", *flags)
    assert result.exit_code == 1
    assert "none.sdelta" in result.stderr
    assert not (tmp_path / "run").exists()


def test_best_delta_is_the_one_of_the_best_evaluation(run: Path, bert: Path, colours: Path) -> None:
    """Evaluated again, it has the recorded metrics."""
    flags = ["--task", "sequence-classification", "--split", "validation", "--json"]
    result = deltakit(
        "evaluate", "--model", bert, "--delta", run / "best.sdelta", "--data", colours, *flags
    )
    assert json.loads(result.stdout)["metrics"] == metrics(run)["best"]["metrics"]


def test_label_names_travel_with_the_delta(run: Path) -> None:
    """Merging can write them."""
    config = load(run / "delta.sdelta").config
    assert config["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    assert config["num_labels"] == 3
    assert config["problem_type"] == "single_label_classification"
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_merged_model_gives_the_live_model_to_the_bit(
    run: Path, bert: Path, colours: Path, tmp_path: Path
) -> None:
    """What was evaluated is what is merged: training's figures, the live logits, and a merged
    folder that transformers loads by itself."""
    merge(bert, [run / "delta.sdelta"], tmp_path / "merged")
    data = ["--data", colours, "--task", "sequence-classification", "--split", "validation"]
    live = evaluated(
        tmp_path / "live.jsonl", "--model", bert, "--delta", run / "delta.sdelta", *data
    )
    merged = evaluated(tmp_path / "merged.jsonl", "--model", tmp_path / "merged", *data)
    assert live["metrics"] == merged["metrics"] == metrics(run)["final"]["metrics"]
    assert live["logits_sha256"] == merged["logits_sha256"]
    assert (tmp_path / "live.jsonl").read_text() == (tmp_path / "merged.jsonl").read_text()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    told = [json.loads(line) for line in (tmp_path / "merged.jsonl").read_text().splitlines()]
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    texts = [row["text"] for row in colour_rows(ROWS)]
    with torch.inference_mode():
        logits = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits
    answers = {tuple(row["logits"]) for row in told}
    close = [
        min(sum(abs(a - b) for a, b in zip(x, y, strict=True)) for x in answers)
        for y in logits.tolist()
    ]
    assert sum(distance < 1e-5 for distance in close) >= len(told)


def test_saved_settings_repeat_the_run_to_the_bit(run: Path, tmp_path: Path) -> None:
    """CONFIG alone, with another folder by flag."""
    result = deltakit("train", run / "config.yaml", "--output-dir", tmp_path / "again", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for name in ("delta.sdelta", "best.sdelta", "budget-100.sdelta"):
        assert (tmp_path / "again" / name).read_bytes() == (run / name).read_bytes()


def test_earlier_run_is_kept(run: Path) -> None:
    """Neither a new run nor a resumed one touches finished results."""
    before = (run / "delta.sdelta").read_bytes()
    result = deltakit("train", run / "config.yaml")
    assert result.exit_code == 1
    assert "holds an earlier run (metrics.json); give another folder, or --force" in result.stderr
    result = deltakit("train", run / "config.yaml", "--resume")
    assert result.exit_code == 1
    assert "is finished; its results are in" in result.stderr
    assert (run / "delta.sdelta").read_bytes() == before


def test_force_replaces_a_run(bert: Path, colours: Path, tmp_path: Path) -> None:
    """Files of the earlier run do not stay beside the new ones; others do."""
    flags = train_flags(bert, colours, tmp_path / "run", max_steps=2, eval_strategy="no")
    flags += ["--unmask-fraction", "1"]
    assert deltakit("train", *flags, "--checkpoint-budgets", 100).exit_code == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    result = deltakit("train", *flags, "--force", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["marks"], record["best"], record["final"]["metrics"]) == ([], None, {})
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert "budget.png" not in names and "budget-100.sdelta" not in names
    assert set(names) >= {"config.yaml", "delta.sdelta", "log.jsonl", "metrics.json", "notes.txt"}


def test_training_goes_on_from_a_delta_and_clear_of_another(
    bert: Path, colours: Path, run: Path, tmp_path: Path
) -> None:
    """--init-delta keeps the old entries, --avoid shares none."""
    old = load(run / "delta.sdelta")
    more = {"max_steps": 3, "eval_strategy": "no"}
    flags = train_flags(bert, colours, tmp_path / "on", **{**more, "budget": 350})
    assert deltakit("train", *flags, "--init-delta", run / "delta.sdelta").exit_code == 0
    longer = load(tmp_path / "on" / "delta.sdelta")
    assert longer.nnz == 350
    flags = train_flags(bert, colours, tmp_path / "clear", **more)
    assert deltakit("train", *flags, "--avoid", run / "delta.sdelta").exit_code == 0
    apart = load(tmp_path / "clear" / "delta.sdelta")
    for name, tensor in old.tensors.items():
        assert set(tensor.indices) <= set(longer.tensors[name].indices)
        if name in apart.tensors:
            assert not set(tensor.indices) & set(apart.tensors[name].indices)
