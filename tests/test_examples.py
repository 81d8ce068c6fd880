"""Every script of examples/ runs in a process of its own, warnings being errors, and keeps its word."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hub_server import HubServer
from push_lab import TOKEN, log_in
from safetensors.numpy import load_file
from tiny_models import colour_rows, write_jsonl, write_llama

import deltakit as dk

EXAMPLES = Path(__file__).parents[1] / "examples"
DEMO = Path(dk.__file__).parent / "demo_data"
SCRIPTS = {path.stem for path in EXAMPLES.glob("*.py")}


def run(script: str, cwd: Path, *flags: object, **environment: str) -> str:
    """What a script prints on stdout; it must succeed."""
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error"),
            # huggingface_hub uploads with an argument that its own HTTP library deprecates.
            *("-W", "ignore:Use 'content=:DeprecationWarning"),
            *(str(EXAMPLES / f"{script}.py"), *map(str, flags)),
        ],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(cwd / "home"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The first rows of the two embedded tasks: 64 to train on, 48 to measure."""
    folders = []
    for task in ("family", "kind"):
        folder = tmp_path_factory.mktemp("tasks") / task
        folder.mkdir()
        for split, rows in (("train", 64), ("validation", 48)):
            lines = (DEMO / "tasks" / task / f"{split}.jsonl").read_text().splitlines()
            (folder / f"{split}.jsonl").write_text("\n".join(lines[:rows]) + "\n")
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def colour_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sentences labelled by the colour in them, with a validation split."""
    folder = tmp_path_factory.mktemp("colours")
    for seed, split in enumerate(("train", "validation")):
        write_jsonl(folder / f"{split}.jsonl", colour_rows(48, seed))
    return folder


def test_classify(tmp_path: Path, tasks: list[Path]) -> None:
    told = run("classify", tmp_path, "--data", tasks[0], "--max-steps", 3, "--budget", 999)
    delta = dk.load(tmp_path / "runs" / "classify" / "delta.sdelta")
    assert delta.nnz == 999
    assert "999 entries" in told and "logits are equal, to the bit" in told
    merged = load_file(tmp_path / "runs" / "classify" / "merged" / "model.safetensors")
    base = load_file(DEMO / "base" / "model.safetensors")
    assert sum(int((base[name] != merged[name]).sum()) for name in base) <= 999


def test_classify_takes_any_model_and_data(tmp_path: Path, bert: Path, colour_task: Path) -> None:
    flags = ("--max-steps", 3, "--budget", 50, "--output", tmp_path / "out")
    told = run("classify", tmp_path, "--model", bert, "--data", colour_task, *flags)
    assert "logits are equal, to the bit" in told
    assert dk.load(tmp_path / "out" / "delta.sdelta").nnz == 50


def test_instruct_tune(tmp_path: Path) -> None:
    """The embedded encoder as a causal model, on a few of its instructions."""
    run("instruct_tune", tmp_path, "--max-steps", 1, "--budget", 40, "--rows", 32)
    out = tmp_path / "runs" / "instruct"
    assert dk.load(out / "run" / "delta.sdelta").nnz == 40
    rows = [json.loads(line) for line in (out / "data" / "train.jsonl").read_text().splitlines()]
    assert {row["prompt"].split()[-1] for row in rows} == {"?"} and len(rows) == 32


def test_instruct_tune_takes_chats(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": row["text"]},
                {"role": "assistant", "content": f"the {row['label']}"},
            ]
        }
        for row in colour_rows(60)
    ]
    data = write_jsonl(tmp_path / "chats.jsonl", rows)
    flags = ("--max-steps", 40, "--budget", 1500, "--prompt", "the red cat", "--output", "out")
    model = write_llama(tmp_path / "llama")
    told = run("instruct_tune", tmp_path, "--model", model, "--data", data, *flags)
    found = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", told)]
    assert found[1] < found[0]
    assert "the red cat -> " in told
    assert dk.load(tmp_path / "out" / "run" / "delta.sdelta").nnz == 1500


def test_budget_sweep(tmp_path: Path, tasks: list[Path]) -> None:
    flags = ("--data", tasks[0], "--budgets", "50,1k", "--max-steps", 2)
    run("budget_sweep", tmp_path, *flags)
    out = tmp_path / "runs" / "sweep"
    rows = json.loads((out / "sweep.json").read_text())
    assert [row["entries"] for row in rows] == [50, 1000]
    assert rows[1]["trained"] == rows[1]["truncated"]  # nothing was cut off the largest
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_multi_task_stack(tmp_path: Path, tasks: list[Path]) -> None:
    flags = ("--max-steps", 2, "--budget", 500, "--methods", "linear,ties")
    told = run("multi_task_stack", tmp_path, "--data", *tasks, *flags)
    assert told.count("logits are equal, to the bit") == 2
    assert re.search(r"^linear +0\.\d+ +0\.\d+$", told, re.MULTILINE)
    (best,) = set(re.findall(r"merged into \S+/(\w+)-(?:family|kind)", told))
    heads = [
        load_file(tmp_path / "runs" / "stack" / f"{best}-{task}" / "model.safetensors")
        for task in ("family", "kind")
    ]
    assert [len(head.pop("classifier.weight")) for head in heads] == [6, 4]
    bodies = [{n: t.tobytes() for n, t in h.items() if "classifier" not in n} for h in heads]
    assert bodies[0] == bodies[1]  # one body does both


def test_mixed_batch_serving(tmp_path: Path, tasks: list[Path]) -> None:
    flags = ("--max-steps", 2, "--budget", 500, "--rows", 6)
    told = run("mixed_batch_serving", tmp_path, "--data", *tasks, *flags)
    assert "6 rows, answers equal" in told
    assert "the merged model's logits, to the bit" in told


def test_sparse_lora_nf4(tmp_path: Path, tasks: list[Path]) -> None:
    pytest.importorskip("bitsandbytes")
    flags = ("--max-steps", 2, "--budget", 500, "--rank", 2, "--share", "10%")
    told = run("sparse_lora_nf4", tmp_path, "--data", tasks[0], *flags)
    out = tmp_path / "runs" / "nf4"
    sparse, lora = (dk.load(out / name / "delta.sdelta") for name in ("sparse", "sparse-lora"))
    assert sparse.nnz == 500 and sparse.adapter is None
    weights = 4 * 2 * 2 * 2 * 160  # layers, queries and values, factors, rank, width
    assert lora.nnz == weights // 10 and lora.adapter is not None
    for name in ("sparse", "sparse-lora"):
        merged = load_file(out / f"{name}-merged" / "model.safetensors")
        assert {str(tensor.dtype) for tensor in merged.values()} == {"float32"}
    assert told.count("in full precision") == 2


def test_rl_weight_patches(tmp_path: Path, bert: Path, colour_task: Path) -> None:
    flags = ("--steps", 3, "--batch", 8, "--budget", 90)
    told = run("rl_weight_patches", tmp_path, "--model", bert, "--data", colour_task, *flags)
    assert "the actor's weights are the trainer's, bit for bit, at step 3" in told
    assert "by one joined patch" in told
    assert "refused: the model is at step 3" in told
    assert len(list((tmp_path / "runs" / "rl").glob("patch-*.sdelta"))) == 3


def test_publish(
    tmp_path: Path, tasks: list[Path], hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(hub, monkeypatch)
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    flags = ("--data", tasks[0], "--max-steps", 4)
    told = run("publish", tmp_path, "org/news", *flags, **environment)
    assert "pulled budget-5000.sdelta of 5,000 entries: equal, byte for byte" in told
    assert "20,000 entries in" in told
    repo = hub.repos["model", "org/news"]
    delta = (tmp_path / "runs" / "publish" / "delta.sdelta").read_bytes()
    assert repo.files("main")["delta.sdelta"].data == delta
    assert TOKEN not in told


def test_every_script_has_a_test_and_a_row() -> None:
    """This file and the table of examples/README.md know all scripts."""
    told = (EXAMPLES / "README.md").read_text()
    rows = {*re.findall(r"^\| \[(\w+)\.py\]", told, re.MULTILINE)}
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert rows == SCRIPTS
    assert tested >= SCRIPTS


NOTEBOOK = EXAMPLES / "tour.ipynb"
EXECUTE = (
    "import sys, nbclient, nbformat; notebook = nbformat.read(sys.argv[1], as_version=4); "
    "nbclient.NotebookClient(notebook, timeout=600, kernel_name='python3').execute(); "
    "nbformat.write(notebook, sys.argv[2])"
)


def test_the_notebook_runs(tmp_path: Path) -> None:
    done = tmp_path / "done.ipynb"
    folders = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    subprocess.run(
        [sys.executable, "-c", EXECUTE, str(NOTEBOOK), str(done)],
        cwd=tmp_path,
        env={
            **os.environ,
            **{name: str(tmp_path / "jupyter") for name in folders},
            "OMP_NUM_THREADS": "1",
        },
        check=True,
    )
    outputs: list[Any] = [
        output
        for cell in nbformat.read(done, as_version=4).cells
        for output in cell.get("outputs", [])
    ]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "20,000 entries in" in printed
    assert "is not the base of the delta" in printed  # the refusal of another base
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert (tmp_path / "runs" / "tour" / "merged" / "model.safetensors").is_file()


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert code and all(not c.outputs and c.execution_count is None for c in code)
