"""`deltakit train` and `deltakit evaluate` from end to end, on tiny models."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tiny_models import colour_rows, write_bert, write_gpt2, write_jsonl, write_llama
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import deltakit as dk
from deltakit.cli.main import main
from deltakit.formats.sdelta import load
from deltakit.merging.merge import merge

ROWS = 120


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with its tokenizer."""
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences labelled by the colour in them, in one file."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "colours.jsonl", colour_rows(ROWS))


def _deltakit(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def _flags(model: Path, data: Path, run: Path, /, **more: Any) -> list[str]:
    settings = {
        "model": model,
        "data": data,
        "task": "sequence-classification",
        "budget": 300,
        "epochs": 2,
        "lr": 0.05,
        "logging_steps": 4,
        "output_dir": run,
        **more,
    }
    return [str(p) for k, v in settings.items() for p in (f"--{k.replace('_', '-')}", v)]


def _metrics(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return content


@pytest.fixture(scope="module")
def run(bert: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two marks."""
    folder = tmp_path_factory.mktemp("out") / "run"
    flags = _flags(bert, colours, folder, checkpoint_budgets="100,200", unmask_fraction=0.5)
    result = _deltakit("train", *flags)
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
    found = _metrics(run)
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
    found = _metrics(run)
    rows = found["analyses"]["travelled"]
    assert [row["entries"] for row in rows] == [100, 200, 300]
    assert rows[-1]["density"] == 300 / found["budget"]["base_weights"]
    assert rows[-1]["distance"] == found["analyses"]["distance"]
    assert 0 < rows[0]["distance"] < rows[-1]["distance"]
    assert found["analyses"]["hessian"] == []


def test_hessian_norms_of_a_run(bert: Path, colours: Path, tmp_path: Path) -> None:
    """Rising numbers of entries, the support itself last; the run's bits are as without."""
    runs = {told: tmp_path / told for told in ("true", "false")}
    for told, run in runs.items():
        flags = _flags(bert, colours, run, method="random", epochs=1, hessian=told)
        result = _deltakit("train", *flags)
        assert result.exit_code == 0, result.output
    rows = _metrics(runs["true"])["analyses"]["hessian"]
    assert [row["entries"] for row in rows] == [4, 18, 75, 300]
    assert 0 < rows[0]["norm"] < rows[-1]["norm"]
    assert (runs["true"] / "density.png").read_bytes().startswith(b"\x89PNG")
    assert not (runs["false"] / "density.png").exists()
    one, other = (load(run / "delta.sdelta") for run in runs.values())
    assert all((t.values == other.tensors[n].values).all() for n, t in one.tensors.items())


def test_a_mask_that_is_missing_leaves_nothing(bert: Path, colours: Path, tmp_path: Path) -> None:
    """What the method needs is read before the folder is made."""
    flags = _flags(bert, colours, tmp_path / "run", method="mask", mask=tmp_path / "none.sdelta")
    result = _deltakit("train", *flags)
    assert result.exit_code == 1
    assert "none.sdelta" in result.stderr
    assert not (tmp_path / "run").exists()


def test_best_delta_is_the_one_of_the_best_evaluation(run: Path, bert: Path, colours: Path) -> None:
    """Evaluated again, it has the recorded metrics."""
    flags = ["--task", "sequence-classification", "--split", "validation", "--json"]
    result = _deltakit(
        "evaluate", "--model", bert, "--delta", run / "best.sdelta", "--data", colours, *flags
    )
    assert json.loads(result.stdout)["metrics"] == _metrics(run)["best"]["metrics"]


def test_label_names_travel_with_the_delta(run: Path) -> None:
    """Merging can write them."""
    config = load(run / "delta.sdelta").config
    assert config["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    assert config["num_labels"] == 3
    assert config["problem_type"] == "single_label_classification"
    assert config["architectures"] == ["BertForSequenceClassification"]


def _evaluated(predictions: Path, *arguments: Any) -> dict[str, Any]:
    result = _deltakit("evaluate", *arguments, "--predictions", predictions, "--json")
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def test_merged_model_gives_the_live_model_to_the_bit(
    run: Path, bert: Path, colours: Path, tmp_path: Path
) -> None:
    """What was evaluated is what is merged: training's figures, the live logits, and a merged
    folder that transformers loads by itself."""
    merge(bert, [run / "delta.sdelta"], tmp_path / "merged")
    data = ["--data", colours, "--task", "sequence-classification", "--split", "validation"]
    live = _evaluated(
        tmp_path / "live.jsonl", "--model", bert, "--delta", run / "delta.sdelta", *data
    )
    merged = _evaluated(tmp_path / "merged.jsonl", "--model", tmp_path / "merged", *data)
    assert live["metrics"] == merged["metrics"] == _metrics(run)["final"]["metrics"]
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
    result = _deltakit("train", run / "config.yaml", "--output-dir", tmp_path / "again", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for name in ("delta.sdelta", "best.sdelta", "budget-100.sdelta"):
        assert (tmp_path / "again" / name).read_bytes() == (run / name).read_bytes()


def test_earlier_run_is_kept(run: Path) -> None:
    """Neither a new run nor a resumed one touches finished results."""
    before = (run / "delta.sdelta").read_bytes()
    result = _deltakit("train", run / "config.yaml")
    assert result.exit_code == 1
    assert "holds an earlier run (metrics.json); give another folder, or --force" in result.stderr
    result = _deltakit("train", run / "config.yaml", "--resume")
    assert result.exit_code == 1
    assert "is finished; its results are in" in result.stderr
    assert (run / "delta.sdelta").read_bytes() == before


def test_force_replaces_a_run(bert: Path, colours: Path, tmp_path: Path) -> None:
    """Files of the earlier run do not stay beside the new ones; others do."""
    flags = _flags(bert, colours, tmp_path / "run", max_steps=2, eval_strategy="no")
    flags += ["--unmask-fraction", "1"]
    assert _deltakit("train", *flags, "--checkpoint-budgets", 100).exit_code == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    result = _deltakit("train", *flags, "--force", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["marks"], record["best"], record["final"]["metrics"]) == ([], None, {})
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert "budget.png" not in names and "budget-100.sdelta" not in names
    assert set(names) >= {"config.yaml", "delta.sdelta", "log.jsonl", "metrics.json", "notes.txt"}


def _start(arguments: list[str], until: str) -> subprocess.Popen[str]:
    """Run deltakit in a process of its own until a line of its stderr matches."""
    process = subprocess.Popen(
        [sys.executable, "-m", "deltakit.cli", "train", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if re.search(until, line):
            return process
    pytest.fail(f"ended before {until!r}: {seen}")


def test_interrupted_run_resumes_to_the_same_bits(
    bert: Path, colours: Path, tmp_path: Path
) -> None:
    """Stopped by SIGTERM, set back to an earlier checkpoint as if killed, and resumed."""
    more = {
        "threads": 1,
        "max_steps": 80,
        "save_steps": 7,  # at the end of every epoch, where the run is evaluated
        "logging_steps": 1,
        "checkpoint_budgets": "100,200",
        "unmask_fraction": 0.9,
        "gradient_accumulation": 2,
        "batch_size": 8,
    }
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    again = [str(broken / "config.yaml"), "--resume"]
    threads = torch.get_num_threads()
    try:
        assert _deltakit("train", *_flags(bert, colours, straight, **more)).exit_code == 0
        process = _start(_flags(bert, colours, broken, **more), r"step 1[2-9]/80")
        process.terminate()
        _, rest = process.communicate()
        assert process.returncode == 128 + signal.SIGTERM
        assert re.search(r"Interrupted and saved at step \d+; deltakit train \S+ --resume", rest)
        assert not (broken / "metrics.json").exists()
        result = _deltakit("train", *_flags(bert, colours, broken, **more))
        assert "--resume to go on" in result.stderr
        result = _deltakit("train", *again, "--lr", 0.1)
        assert "setting lr was 0.05 when the run started and is 0.1 now" in result.stderr
        newest = max(broken.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        shutil.rmtree(newest)
        result = _deltakit("train", *again)
        assert result.exit_code == 0, result.output
    finally:
        torch.set_num_threads(threads)
    for name in ("delta.sdelta", "best.sdelta", "budget-100.sdelta", "budget-200.sdelta"):
        assert (broken / name).read_bytes() == (straight / name).read_bytes(), name
    one, two = _metrics(straight), _metrics(broken)
    assert [m["metrics"] for m in one["marks"]] == [m["metrics"] for m in two["marks"]]
    assert one["final"]["metrics"] == two["final"]["metrics"]
    assert one["best"]["step"] == two["best"]["step"]
    assert _logged(straight) == _logged(broken)


def _logged(run: Path) -> list[dict[str, Any]]:
    """All that the log tells but times."""
    lines = (run / "log.jsonl").read_text().splitlines()
    clocks = ("runtime", "per_second", "preparation_time")
    records = [json.loads(line) for line in lines]
    told = [{k: v for k, v in r.items() if not k.endswith(clocks)} for r in records]
    return [record for record in told if "train_loss" not in record]


def test_resume_without_a_run(bert: Path, colours: Path, tmp_path: Path) -> None:
    """There is nothing to go on with."""
    result = _deltakit("train", *_flags(bert, colours, tmp_path / "none"), "--resume")
    assert result.exit_code == 1
    assert "holds no run to resume; leave out --resume" in result.stderr


@pytest.mark.parametrize("form", ["chat", "completion", "text"])
def test_language_models(form: str, tmp_path: Path) -> None:
    """A decoder learns to answer; the loss falls, and merging gives the live logits."""
    model = write_llama(tmp_path / "llama")
    texts = [(f"the {c} cat", a) for c, a in (("red", "yes"), ("blue", "no")) for _ in range(20)]
    rows: dict[str, list[dict[str, Any]]] = {
        "completion": [
            {"prompt": p, "completion": f" {c}", "id": i} for i, (p, c) in enumerate(texts)
        ],
        "text": [{"text": f"{p} {c}", "id": i} for i, (p, c) in enumerate(texts)],
        "chat": [
            {
                "id": i,
                "messages": [
                    {"role": "user", "content": p},
                    {"role": "assistant", "content": c},
                ],
            }
            for i, (p, c) in enumerate(texts)
        ],
    }
    data = write_jsonl(tmp_path / "rows.jsonl", rows[form])
    flags = _flags(model, data, tmp_path / "run", task="causal-lm", budget="5%", epochs=6)
    result = _deltakit("train", *flags, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    logged = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [r["eval_loss"] for r in logged if "eval_loss" in r]
    assert losses[-1] < losses[0]
    assert record["metric"] == "loss"
    assert record["best"]["metrics"]["loss"] == min(losses)
    merge(model, [tmp_path / "run/delta.sdelta"], tmp_path / "merged")
    data_flags = ["--data", data, "--task", "causal-lm", "--split", "validation"]
    delta = ["--delta", tmp_path / "run/delta.sdelta"]
    live = _evaluated(tmp_path / "a.jsonl", "--model", model, *delta, *data_flags)
    merged = _evaluated(tmp_path / "b.jsonl", "--model", tmp_path / "merged", *data_flags)
    assert live["metrics"] == merged["metrics"] == record["final"]["metrics"]
    assert live["logits_sha256"] == merged["logits_sha256"]


def test_decoder_with_a_new_head_merges_with_its_padding_token(tmp_path: Path) -> None:
    """A GPT-2 classifier needs a padding token in its config, which merging must write."""
    model = write_gpt2(tmp_path / "gpt2")
    data = write_jsonl(tmp_path / "rows.jsonl", colour_rows(40))
    result = _deltakit("train", *_flags(model, data, tmp_path / "run", max_steps=4))
    assert result.exit_code == 0, result.output
    merge(model, [tmp_path / "run/delta.sdelta"], tmp_path / "merged")
    data_flags = ["--data", data, "--task", "sequence-classification", "--split", "validation"]
    delta = ["--delta", tmp_path / "run/delta.sdelta"]
    live = _evaluated(tmp_path / "a.jsonl", "--model", model, *delta, *data_flags)
    merged = _evaluated(tmp_path / "b.jsonl", "--model", tmp_path / "merged", *data_flags)
    assert live["logits_sha256"] == merged["logits_sha256"]
    assert load(tmp_path / "run/delta.sdelta").config["pad_token_id"] == 5


def test_regression_and_early_stopping(bert: Path, tmp_path: Path) -> None:
    """Float labels give one output; training stops when the metric no longer improves."""
    rows = [{"text": r["text"], "label": len(r["text"]) / 10} for r in colour_rows(60)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = _flags(bert, data, tmp_path / "run", epochs=30, early_stopping_patience=2, lr=1e-9)
    result = _deltakit("train", *flags, "--head-lr", "1e-9", "--metric", "spearman", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert list(record["final"]["metrics"]) == ["pearson", "spearman", "mse"]
    assert record["steps"] < 30 * 4
    assert load(tmp_path / "run/delta.sdelta").config["problem_type"] == "regression"


def test_training_goes_on_from_a_delta_and_clear_of_another(
    bert: Path, colours: Path, run: Path, tmp_path: Path
) -> None:
    """--init-delta keeps the old entries, --avoid shares none."""
    old = load(run / "delta.sdelta")
    more = {"max_steps": 3, "eval_strategy": "no"}
    flags = _flags(bert, colours, tmp_path / "on", **{**more, "budget": 350})
    assert _deltakit("train", *flags, "--init-delta", run / "delta.sdelta").exit_code == 0
    longer = load(tmp_path / "on" / "delta.sdelta")
    assert longer.nnz == 350
    flags = _flags(bert, colours, tmp_path / "clear", **more)
    assert _deltakit("train", *flags, "--avoid", run / "delta.sdelta").exit_code == 0
    apart = load(tmp_path / "clear" / "delta.sdelta")
    for name, tensor in old.tensors.items():
        assert set(tensor.indices) <= set(longer.tensors[name].indices)
        if name in apart.tensors:
            assert not set(tensor.indices) & set(apart.tensors[name].indices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "gone.jsonl"}, "data gone.jsonl does not exist"),
        ({"text_column": "body"}, "has no column 'body'; found text, label"),
        ({"num_labels": 2}, "3 different labels, the model 2"),
        ({"validation_fraction": 0}, "has no validation data and validation_fraction is 0"),
        ({"train_split": "training"}, "has no split 'training'; found train"),
        ({"metric": "acuracy"}, "'acuracy' is no metric of this task; expected one of accuracy"),
        ({"init_delta": "gone.sdelta"}, "gone.sdelta"),
        ({"checkpoint_budgets": "1m"}, "must lie between 1 and the budget"),
        ({"target": "*.nothing"}, "target pattern '*.nothing' matches no tensor"),
    ],
)
def test_mistakes_are_one_line(
    change: dict[str, Any], message: str, bert: Path, colours: Path, tmp_path: Path
) -> None:
    """Exit code 1, no traceback, and nothing written."""
    result = _deltakit("train", *_flags(bert, colours, tmp_path / "run", **change), "--quiet")
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.sdelta"))


def test_data_mistakes_come_before_the_model(colours: Path, tmp_path: Path) -> None:
    """The model's weights are not even there."""
    model = write_bert(tmp_path / "model")
    (model / "model.safetensors").unlink()
    result = _deltakit("train", *_flags(model, colours, tmp_path / "run", label_column="y"))
    assert "has no column 'y'; found text, label" in result.stderr


def test_wrong_flags_are_wrong_usage() -> None:
    """Exit code 2, with the setting's own words."""
    result = _deltakit("train", "--lr", "fast")
    assert result.exit_code == 2
    assert "setting lr: expected a number; found 'fast'" in result.stderr


def test_evaluating_a_base_without_a_head(bert: Path, colours: Path) -> None:
    """Only a delta can bring one."""
    result = _deltakit(
        "evaluate", "--model", bert, "--data", colours, "--task", "sequence-classification"
    )
    assert result.exit_code == 1
    assert "has no classification head; give the delta that brings one" in result.stderr


def test_help_names_every_setting() -> None:
    """Without importing torch."""
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom deltakit.cli.main import main\n"
        "print(CliRunner().invoke(main, ['train', '--help']).output)\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for flag in ("--checkpoint-budgets", "--init-delta", "--early-stopping-patience", "--resume"):
        assert flag in done.stdout
    assert dk.__version__
