"""Comparing methods: equal budgets, peers on the same data, finished and interrupted cells."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny_models import colour_rows, write_gpt2, write_jsonl
from transformers import TrainerCallback

import deltakit as dk
from deltakit.cli.main import main
from deltakit.errors import BudgetError, ConfigError, OutputExistsError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.training.build import Plan, Subject, build_trainer
from deltakit.training.cells import Cell, run_cells, train_cell
from deltakit.training.comparison import compare_methods, comparison_table, method_cell
from deltakit.training.config import TrainConfig
from deltakit.training.config_file import resolve, write_file
from deltakit.training.folder import RunFolder
from deltakit.training.peer_run import train_peer
from deltakit.training.peers import PEERS, RATES
from deltakit.training.prepare import prepare
from deltakit.training.presets import PRESETS
from deltakit.training.run import train
from deltakit.training.sweeps import sweep_d3, sweep_table

RANK_ONE = 2 * (4 * (16 + 16) + 2 * (16 + 32)) + 16 + 16  # LoRA weights on two layers, pooler


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences labelled by the colour in them."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "colours.jsonl", colour_rows(60))


def _settings(model: Path, data: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": str(data),
        "task": "sequence-classification",
        "budget": 1000,
        "max_steps": 6,
        "batch_size": 8,
        "eval_strategy": "budget",
        "output_dir": str(out),
        **more,
    }


def _run_of(record: dict[str, Any], method: str, seed: int) -> dict[str, Any]:
    row = next(row for row in record["methods"] if row["method"] == method)
    run: dict[str, Any] = next(run for run in row["runs"] if run["seed"] == seed)
    return run


def test_comparison_from_end_to_end(
    bert: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Budgets are equal, a method that cannot meet them fails alone, and nothing is done twice."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = _settings(bert, colours, tmp_path / "out", budget=RANK_ONE - 1)
    methods = ["random", "lora"]
    found = compare_methods(settings, {}, methods, seeds=[0], rates={"lora": "2e-3"})
    random = _run_of(found, "random", 0)
    assert (random["trained"], random["extras"]) == (RANK_ONE - 1, 51)
    assert f"have {RANK_ONE} weights, above the budget" in _run_of(found, "lora", 0)["error"]
    assert random["bytes"] == (tmp_path / "out/random/seed-0/delta.sdelta").stat().st_size
    told = json.loads((tmp_path / "out/lora/seed-0/cell.json").read_text())
    assert told["peer"] == "lora" and told["settings"]["lr"] == 2e-3
    rows = comparison_table(found)
    assert [row[0] for row in rows] == ["method", *methods]
    assert rows[2][2] == "failed"

    _interrupt(resolve(settings, {"method": "random", "seed": 1}), tmp_path / "out/random/seed-1")
    before = _files(tmp_path / "out/random/seed-0")
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()]
    flags += ["--compare=random", "--seeds=0,1", "--json", "-q"]
    result = CliRunner().invoke(main, ["train", *flags])
    assert result.exit_code == 0, result.output
    again = json.loads(result.stdout)
    assert _files(tmp_path / "out/random/seed-0") == before
    assert _run_of(again, "random", 0) == random
    resumed = _run_of(again, "random", 1)
    assert resumed["train_seconds"] is None  # only a part of it was seen
    straight = {**settings, "output_dir": str(tmp_path / "straight"), "method": "random"}
    train(resolve(straight, {"seed": 1}))
    one, two = (dk.load(tmp_path / f / "delta.sdelta") for f in ("straight", "out/random/seed-1"))
    assert one.equals(two)

    values = [random["value"], resumed["value"]]
    mean = sum(values) / 2
    assert again["methods"][0]["mean"] == pytest.approx(mean)
    deviation = abs(values[0] - values[1]) / 2**0.5  # of a sample of two
    assert again["methods"][0]["deviation"] == pytest.approx(deviation)
    assert again == json.loads((tmp_path / "out/compare.json").read_text())
    lines = list(csv.DictReader((tmp_path / "out/compare.csv").read_text().splitlines()))
    assert [(line["method"], line["seed"]) for line in lines] == [("random", "0"), ("random", "1")]
    assert float(lines[0]["accuracy"]) == random["value"]
    assert (tmp_path / "out/compare.png").read_bytes().startswith(b"\x89PNG")
    assert "<h1>" in (tmp_path / "out/report.html").read_text()

    with pytest.raises(OutputExistsError, match=r"another head_lr .*or --force to replace it"):
        compare_methods({**settings, "head_lr": 0.5}, {}, ["random"], seeds=[0])


def test_settings_go_to_the_methods_that_take_them(tmp_path: Path) -> None:
    """Each method stands on its own preset, and rates are its own."""
    file = _settings(tmp_path, tmp_path, tmp_path, method="id3", exp=1.0, lr=0.05, budget="1k")
    file |= {"checkpoint_budgets": [10], "early_stopping_patience": 2, "weight_decay": 0.1}

    def config(name: str, rate: Any = None, **flags: Any) -> TrainConfig:
        cell = method_cell(name, 3, file, flags, rate)
        assert cell.folder == tmp_path / name / "seed-3"
        assert (cell.peer is not None) == (name in PEERS.names())
        shared = ("seed", "weight_decay", "checkpoint_budgets", "early_stopping_patience", "budget")
        assert [getattr(cell.config, key) for key in shared] == [3, 0.1, (), None, "1k"]
        return cell.config

    own = config("id3")
    assert (own.exp, own.lr, own.preset) == (1.0, 0.05, "id3-default")
    assert config("id3", "2e-3").lr == 2e-3
    mask = config("random", eps=2.0)
    assert (mask.lr, mask.preset) == (PRESETS["random-default"]["lr"], "random-default")
    paper = config("id3-paper-best")
    assert (paper.exp, paper.eps, paper.age, paper.method) == (-1.0, 0.5, "shared", "id3")
    assert config("static", eps=2.0).eps == 2.0
    assert config("full").lr == RATES["full"]
    assert config("lora", lr="auto").lr == RATES["lora"]
    assert config("random", lr="auto").lr == "auto"
    assert config("head", 0.3).head_lr == 0.3


class _StopAt(TrainerCallback):
    """Sends this process a SIGTERM during a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def _interrupt(config: TrainConfig, folder: Path) -> None:
    """Leave a cell as it is when its process was told to stop in the third step."""
    cell = Cell("", resolve({**config.as_dict(), "output_dir": str(folder)}, {}))
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text(json.dumps(cell.as_dict()))
    prepared = prepare(cell.config, print)
    base, run = Checkpoint(prepared.located.folder), RunFolder(folder)
    write_file(cell.config, run.config)
    subject = Subject(cell.config, prepared, base)
    trainer = build_trainer(subject, Plan.of(cell.config, base.total_weights), run)
    trainer.add_callback(_StopAt())
    trainer.train()
    assert [path.name for path in run.checkpoints()] == ["checkpoint-3"]


def _files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_peers_see_what_a_run_sees(bert: Path, colours: Path, tmp_path: Path) -> None:
    """The same head, data order and dropout: at a rate of nothing, a mask is a head alone."""
    settings = _settings(bert, colours, tmp_path / "mask", method="random", lr=1e-30, head_lr=1e-2)
    outcome = train(resolve(settings, {}))
    assert outcome.record is not None
    config = resolve({**settings, "output_dir": str(tmp_path / "head")}, {})
    record = train_peer("head", config)
    assert record["final"]["metrics"] == pytest.approx(outcome.record["final"]["metrics"], rel=1e-6)
    head = load_file(tmp_path / "head" / "adapter.safetensors")
    extras = dk.load(tmp_path / "mask" / "delta.sdelta").extras
    for name, array in extras.items():  # two AdamWs round differently
        torch.testing.assert_close(head[name], torch.from_numpy(array), rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # peft does not choose
@pytest.mark.parametrize("name", PEERS.names())
def test_peers_train_what_they_say(name: str, bert: Path, colours: Path, tmp_path: Path) -> None:
    """The number of weights, and a result that holds them and the head."""
    settings = _settings(bert, colours, tmp_path, lr=1e-2, budget=RANK_ONE * 3 - 1)
    record = train_peer(name, resolve(settings, {}))
    expected = {"full": Checkpoint(bert).total_weights, "head": 0}.get(name, RANK_ONE * 2)
    assert record["budget"]["reached"] == record["final"]["entries"] == expected
    assert record["extras"]["weights"] == 51
    assert record["peak_bytes_above_model"] >= 0
    assert set(record["final"]["metrics"]) == {"accuracy", "macro_f1", "matthews", "loss"}
    if name == "full":
        assert record["final"]["bytes"] == 4 * (expected + 51) + _buffer_bytes(bert)
        return
    stored = load_file(tmp_path / "adapter.safetensors")
    values = {n: t for n, t in stored.items() if t.is_floating_point()}
    assert sum(t.numel() for t in values.values()) == expected + 51
    assert all(t.count_nonzero() for t in values.values())


def _buffer_bytes(bert: Path) -> int:
    from transformers import BertModel

    buffers = BertModel.from_pretrained(bert).buffers()
    return sum(b.numel() * b.element_size() for b in buffers)


def test_adapters_on_transposed_layers(tmp_path: Path, colours: Path) -> None:
    """GPT-2 keeps its weights the other way round; a target narrows the layers."""
    base = write_gpt2(tmp_path / "base")
    settings = _settings(base, colours, tmp_path / "run", target=["*c_attn.weight"], lr=1e-2)
    record = train_peer("lora", resolve({**settings, "method": "random"}, {}))
    one = 2 * (16 + 48)
    assert record["budget"]["reached"] == 1000 // one * one


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", ["lora", "shira"])
def test_adapters_in_bfloat16_below_the_size_of_a_layer(
    name: str, bert: Path, colours: Path, tmp_path: Path
) -> None:
    """Adapters stay in float32, and no budget makes one larger than its layer."""
    settings = _settings(bert, colours, tmp_path, budget=4000, dtype="bfloat16", lr=1e-2)
    record = train_peer(name, resolve(settings, {}))
    assert record["budget"]["reached"] == 16 * 16 // (16 + 16) * RANK_ONE
    stored = load_file(tmp_path / "adapter.safetensors")
    kinds = {t.dtype for n, t in stored.items() if t.is_floating_point() and "classifier" not in n}
    assert kinds == {torch.float32}


def test_adapters_above_the_budget_are_refused(bert: Path, colours: Path, tmp_path: Path) -> None:
    """Rank 1 is the least."""
    config = resolve(_settings(bert, colours, tmp_path, budget=RANK_ONE - 1), {})
    with pytest.raises(BudgetError, match=rf"13 targeted layers have {RANK_ONE} weights, above"):
        train_peer("lora", config)


@pytest.mark.parametrize(
    ("methods", "more", "message"),
    [
        (["id4"], {}, "'id4' is none of the methods to compare"),
        (["id3", "id3"], {}, "every method and every seed once"),
        (["id3"], {"seeds": []}, "every method and every seed once"),
        (["id3"], {"rates": {"lora": 1}}, "'lora' is none of the methods to compare"),
        (["id3"], {"flags": {"lr": 0.1}}, "one lr for all methods; use --compare-lr id3="),
        (["id3"], {"flags": {"eval_strategy": "no"}}, "nothing to compare"),
    ],
)
def test_refusals(methods: list[str], more: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Before anything is run."""
    flags = more.pop("flags", {})
    with pytest.raises(ConfigError, match=message):
        compare_methods(_settings(tmp_path, tmp_path, tmp_path / "o"), flags, methods, **more)
    assert not (tmp_path / "o").exists()


def test_a_folder_that_is_no_cell_is_kept(bert: Path, colours: Path, tmp_path: Path) -> None:
    """Neither filled up nor replaced."""
    config = resolve(_settings(bert, colours, tmp_path, method="random"), {})
    write_file(config, tmp_path / "config.yaml")
    with pytest.raises(OutputExistsError, match="holds a run of its own"):
        run_cells([Cell("random", config)], force=True, say=print)


def test_sweep_over_exp_and_eps(bert: Path, colours: Path, tmp_path: Path) -> None:
    """A point per pair; finished ones, as these all are, are only read."""
    settings = _settings(bert, colours, tmp_path, method="id3")
    for exp in (0.0, 1.0, -1.0):
        folder = tmp_path / f"eps-0.5-exp-{exp:g}"
        folder.mkdir()
        config = resolve({**settings, "output_dir": str(folder)}, {"eps": 0.5, "exp": exp})
        (folder / "cell.json").write_text(json.dumps(Cell("", config).as_dict()))
        train_cell(folder)
    found = sweep_d3(settings, {}, eps=[0.5], exp=[1, 0, -1])
    metrics = [
        json.loads((tmp_path / f"eps-0.5-exp-{exp}" / "metrics.json").read_text())
        for exp in (1, 0, -1)
    ]
    assert [p["value"] for p in found["points"]] == [
        m["final"]["metrics"]["accuracy"] for m in metrics
    ]
    assert dk.load(tmp_path / "eps-0.5-exp--1" / "delta.sdelta").provenance["exp"] == -1.0
    assert [row[0] for row in sweep_table(found)] == ["exp", "1", "0", "-1"]
    lines = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [(line["eps"], line["exp"]) for line in lines] == [
        ("0.5", "1.0"),
        ("0.5", "0.0"),
        ("0.5", "-1.0"),
    ]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "<h1>" in (tmp_path / "report.html").read_text()
    with pytest.raises(ConfigError, match="setting eps does not apply to method random"):
        sweep_d3(settings, {"method": "random"}, eps=[1], exp=[0])


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
