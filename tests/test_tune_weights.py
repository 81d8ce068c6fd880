"""Weights tuned on validation data: what is recorded is what is stacked, nothing stays in the model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny_models import colour_rows, write_bert, write_jsonl

import deltakit as dk
from deltakit.cli.main import main
from deltakit.errors import BaseMismatchError, ConfigError, DeltaError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import identify
from deltakit.training.evaluate import EvaluateConfig, Evaluator, evaluate
from deltakit.training.tuned_stack import TunedStack
from deltakit.training.weight_evaluation import StackEvaluation, choose_objective
from deltakit.weight_search import Weights, WeightSearch, plain_choices, search_weights

TASK = "sequence-classification"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without a head, its data, and two random deltas with heads of their own."""
    folder = tmp_path_factory.mktemp("work")
    write_jsonl(folder / "data.jsonl", colour_rows(90))
    base = Checkpoint(write_bert(folder / "base"))
    random = np.random.default_rng(0)
    labels = dict(enumerate(["blue", "green", "red"]))
    for name in ("a", "b"):
        tensors = {}
        for place in ("embeddings.word_embeddings.weight", "encoder.layer.1.output.dense.weight"):
            info = base.tensors[place]
            tensors[place] = dk.TensorDelta(
                name=place,
                shape=info.shape,
                dtype=info.dtype,
                mode="add",
                indices=np.sort(random.choice(info.numel, 150, replace=False)),
                values=random.standard_normal(150).astype(np.float32),
            )
        head = random.standard_normal((3, 16)).astype(np.float32)
        delta = dk.SparseDelta(
            tensors=tensors,
            extras={"classifier.weight": head, "classifier.bias": np.zeros(3, np.float32)},
            base=identify(base, {place: t.indices for place, t in tensors.items()}),
            config={
                "architectures": ["BertForSequenceClassification"],
                "id2label": {str(number): label for number, label in labels.items()},
                "label2id": {label: number for number, label in labels.items()},
                "num_labels": 3,
                "problem_type": "single_label_classification",
            },
        )
        dk.save(delta, folder / f"{name}.sdelta")
    return folder


def _deltakit(*arguments: Any, code: int = 0) -> tuple[str, str]:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    return done.stdout, done.stderr


def _deltas(work: Path) -> list[Path]:
    return [work / "a.sdelta", work / "b.sdelta"]


def _tune(work: Path, **more: Any) -> TunedStack:
    given = {"model": work / "base", "data": work / "data.jsonl", "task": TASK, "head": 0}
    return dk.tune_weights(_deltas(work), **{"evaluations": 12, **given, **more})


def _loss(work: Path, delta: dk.SparseDelta, tmp_path: Path, metric: str = "loss") -> float:
    """The metric that `deltakit evaluate` gives of a delta."""
    dk.save(delta, tmp_path / "one.sdelta")
    config = EvaluateConfig(model=str(work / "base"), data=str(work / "data.jsonl"), task=TASK)
    result = evaluate(config, [tmp_path / "one.sdelta"], split="validation")
    found: float = result["metrics"][metric]
    return found


@pytest.mark.parametrize(
    ("method", "options"), [("linear", {}), ("ties", {"density": 0.5}), ("dare-ties", {})]
)
def test_the_stack_is_the_one_of_the_weights_and_measures_as_recorded(
    method: str, options: dict[str, Any], work: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    found = _tune(work, method=method, seed=3, say=told.append, **options)
    search = found.search
    seeded = {"seed": 3} if method.startswith("dare") else {}
    expected = dk.stack(
        _deltas(work), method, search.weights, head=0, base=work / "base", **options, **seeded
    )
    record = found.delta.provenance["search"]
    bare = {k: v for k, v in found.delta.provenance.items() if k != "search"}
    assert replace(found.delta, provenance=bare).equals(expected)
    measured = {e.weights: e.metrics["loss"] for e in search.evaluations}
    assert _loss(work, found.delta, tmp_path) == measured[search.weights]
    for name, weights in list(plain_choices(2).items())[1:3]:
        stacked = dk.stack(_deltas(work), method, weights, head=0, **options, **seeded)
        assert _loss(work, stacked, tmp_path) == measured[weights], name
    assert record["tried"] == [[list(e.weights), e.value] for e in search.evaluations]
    assert record["weights"] == list(search.weights)
    assert [record[k] for k in ("model", "data", "split")] == ["base", "data.jsonl", "validation"]
    assert sum(" left" in line for line in told) == record["evaluations"] == 12
    dk.save(found.delta, tmp_path / "two.sdelta")
    assert dk.load(tmp_path / "two.sdelta").equals(found.delta)


def test_parts_of_a_delta_trained_on_the_demo_base(tmp_path: Path) -> None:
    """Real weights, real text: better than any plain choice, and what `evaluate` measures."""
    source = Path(dk.__file__).parent / "demo_data"
    (tmp_path / "data").mkdir()
    for split, rows in (("train", 60), ("validation", 30)):
        lines = (source / "tasks/family" / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(lines[:: len(lines) // rows]))
    common: dict[str, Any] = {"model": source / "base", "data": tmp_path / "data", "task": TASK}
    flags = [part for name, value in common.items() for part in (f"--{name}", value)]
    flags += ["--budget", 5000, "--max-steps", 5, "--lr", 0.02, "--method", "random"]
    flags += ["--max-length", 24, "--batch-size", 12, "--eval-strategy", "no"]
    _deltakit("train", *flags, "--output-dir", tmp_path / "run")
    trained = dk.load(tmp_path / "run/delta.sdelta")
    parts = [["encoder.layer.0", "encoder.layer.1", "classifier"], ["encoder.layer.[23]*"]]
    deltas = [dk.restrict(trained, part) for part in parts]
    found = dk.tune_weights(deltas, **common, evaluations=8, settings={"max_length": 24})
    plain, searched = found.search.evaluations[:4], found.search.evaluations[4:]
    assert found.search.value == min(e.value for e in searched) < min(e.value for e in plain)
    dk.save(found.delta, tmp_path / "tuned.sdelta")
    config = EvaluateConfig(**{k: str(v) for k, v in common.items()}, max_length=24)
    metrics = evaluate(config, [tmp_path / "tuned.sdelta"])["metrics"]
    assert metrics == min(found.search.evaluations, key=lambda e: e.value).metrics


def test_the_same_seed_gives_the_same_search_and_file(work: Path) -> None:
    one, other = _tune(work), _tune(work)
    assert one.search.record() == other.search.record()
    assert one.delta.equals(other.delta)


def _evaluation(work: Path) -> StackEvaluation:
    """The objective by itself, with the model before any measurement."""
    from deltakit.combine.method import make_method
    from deltakit.merging.inputs import read_inputs
    from deltakit.stacking import read_tasks

    plain = dk.stack(_deltas(work), head=0)
    config = EvaluateConfig(model=str(work / "base"), data=str(work / "data.jsonl"), task=TASK)
    ready = Evaluator.of(config, [plain], "validation", lambda text: None)
    tasks = read_tasks(read_inputs(_deltas(work)), None, ready.base)
    return StackEvaluation(ready, tasks, make_method("linear"), plain.extras, "loss")


def _bits(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def test_the_model_is_bit_identical_after_the_search(work: Path) -> None:
    measure = _evaluation(work)
    before = _bits(measure.ready.model)
    search: WeightSearch = search_weights(measure, 2, evaluations=9)
    assert len({e.metrics["loss"] for e in search.evaluations}) > 5
    assert _bits(measure.ready.model) == before


def test_a_measurement_that_breaks_off_leaves_the_model_as_it_was(work: Path) -> None:
    measure = _evaluation(work)
    before = _bits(measure.ready.model)
    seen = []

    def interrupt(module: torch.nn.Module, inputs: Any) -> None:
        seen.append(_bits(measure.ready.model) != before)
        raise KeyboardInterrupt

    hook = measure.ready.model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure((1.0, 1.0))
    hook.remove()
    assert seen == [True]
    assert _bits(measure.ready.model) == before


def test_logits_that_are_not_finite_do_not_pass_as_a_metric(work: Path) -> None:
    """Their argmax would: it gives some accuracy for NaN."""
    measure = replace(_evaluation(work), metric="accuracy")
    with torch.no_grad():
        measure.ready.model.bert.embeddings.LayerNorm.bias.fill_(math.nan)
    found = measure((1.0, 0.0))
    assert list(found) == ["accuracy"]
    assert math.isnan(found["accuracy"])


def test_accuracy_as_the_objective(work: Path) -> None:
    search = _tune(work, objective="accuracy").search
    best = max(search.evaluations, key=lambda e: e.metrics["accuracy"] - 0.05 * _mean(e.weights))
    assert search.weights == best.weights
    assert search.value == -best.metrics["accuracy"] + 0.05 * _mean(best.weights)


def _mean(weights: Weights) -> float:
    return float(np.abs(weights).mean())


def test_the_loss_of_a_regression_is_its_squared_error() -> None:
    assert choose_objective(("pearson", "spearman", "mse"), "loss") == "mse"
    assert choose_objective(("accuracy", "loss"), "loss") == "loss"
    with pytest.raises(ConfigError, match=r"'acuracy' is no metric of this task; .*nearest: acc"):
        choose_objective(("accuracy", "loss"), "acuracy")


def test_all_is_checked_before_the_model_is_loaded(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("deltakit.training.evaluate.load_model", load)
    for error, told, given in [
        (ConfigError, "objective 'f2' is no metric", {"objective": "f2"}),
        (ConfigError, "3 evaluations are fewer than the 4", {"evaluations": 3}),
        (ConfigError, "takes no option 'density'", {"density": 0.5}),
        (ConfigError, "unknown stacking method 'tise'", {"method": "tise"}),
        (DeltaError, "choose one with head", {"head": None}),
        (ConfigError, "an evaluation has no setting 'batch'", {"settings": {"batch": 3}}),
    ]:
        with pytest.raises(error, match=told):
            _tune(work, **given)


def test_another_base_is_refused(work: Path, tmp_path: Path) -> None:
    base = Checkpoint(work / "base")
    delta = dk.load(work / "a.sdelta")
    other = identify(base, {name: t.indices for name, t in delta.tensors.items()})
    name = next(iter(delta.tensors))
    wrong = replace(other.tensors[name], sample="0" * 16)
    delta = replace(delta, base=replace(other, tensors={**other.tensors, name: wrong}))
    with pytest.raises(BaseMismatchError, match=name):
        dk.tune_weights([delta], model=work / "base", data=work / "data.jsonl", task=TASK)


def _command(work: Path, output: Path, *more: Any) -> list[Any]:
    measured = ["--model", work / "base", "--data", work / "data.jsonl", "--task", TASK]
    return ["stack", *_deltas(work), "-o", output, "--tune-weights", *measured, "--head", 1, *more]


def test_the_command_reports_every_evaluation(work: Path, tmp_path: Path) -> None:
    output, plot = tmp_path / "out.sdelta", tmp_path / "search.png"
    more = ["--evaluations", 7, "--seed", 5, "--objective", "accuracy", "--bounds", -1, 2]
    more += ["--regularization", 0.01, "--eval-batch-size", 4, "--plot", plot, "--json"]
    out, err = _deltakit(*_command(work, output, *more))
    told = json.loads(out)
    library = _tune(
        work,
        head=1,
        evaluations=7,
        seed=5,
        objective="accuracy",
        bounds=(-1, 2),
        regularization=0.01,
        settings={"eval_batch_size": 4},
    )
    assert dk.load(output).equals(library.delta)
    assert told["output"] == str(output)
    assert told["search"]["weights"] == [s["weight"] for s in told["sources"]]
    assert [e["number"] for e in told["search"]["evaluations"]] == [1, 2, 3, 4, 5, 6, 7]
    assert all(set(e["metrics"]) >= {"accuracy", "loss"} for e in told["search"]["evaluations"])
    assert all(e["seconds"] > 0 for e in told["search"]["evaluations"])
    lines = [line for line in err.splitlines() if line[:2] in {f"{n}/" for n in range(1, 8)}]
    assert [line.partition(" ")[0] for line in lines] == [f"{n}/7" for n in range(1, 8)]
    assert lines[0].startswith("1/7 all 1 1,1: accuracy ")
    assert lines[-1].endswith(" s, 0:00 left")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_command_tells_weights_that_give_the_same_stack(work: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.sdelta"
    out, _ = _deltakit(*_command(work, output, "--evaluations", 8))
    line = out.splitlines()[-1]
    weights = line.removeprefix("weights ").partition(":")[0]
    assert line.startswith("weights ") and "the lowest of 8 evaluations" in line
    _deltakit("stack", *_deltas(work), "-o", tmp_path / "b", "--weights", weights, "--head", 1)
    again, tuned = dk.load(tmp_path / "b"), dk.load(output)
    assert all(t.equals(again.tensors[name]) for name, t in tuned.tensors.items())
    assert list(again.tensors) == list(tuned.tensors)


@pytest.mark.parametrize(
    ("more", "code", "told"),
    [
        (["--tune-weights"], 2, "measures a model on data: give --model, --data, --task"),
        (["--tune-weights", "--model", "m", "--task", TASK], 2, "on data: give --data"),
        (["--tune-weights", "--weights", "1,1"], 2, "--weights does not go with --tune-weights"),
        (["--tune-weights", "--tensor-weights", "*=1,1"], 2, "--tensor-weights does not go with"),
        (["--tune-weights", "--base", "b"], 2, "--base does not go with --tune-weights"),
        (["--data", "d"], 2, "--data goes with --tune-weights only"),
        (["--evaluations", "9"], 2, "--evaluations goes with --tune-weights only"),
        (
            ["--tune-weights", "--model", "./no", "--data", "d", "--task", TASK],
            1,
            "expected a folder with config.json",
        ),
    ],
)
def test_refusals(more: list[str], code: int, told: str, work: Path, tmp_path: Path) -> None:
    _, err = _deltakit("stack", *_deltas(work), "-o", tmp_path / "out.sdelta", *more, code=code)
    assert told in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_told_before_the_search(work: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.sdelta"
    output.write_text("mine")
    _, err = _deltakit(*_command(work, output), code=1)
    assert "exists" in err and "1/40" not in err
    assert output.read_text() == "mine"


def test_an_interruption_tells_the_best_and_writes_nothing(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Weights] = []
    whole = StackEvaluation.__call__

    def measure(self: StackEvaluation, weights: Weights) -> dict[str, float]:
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(weights)
        return whole(self, weights)

    monkeypatch.setattr(StackEvaluation, "__call__", measure)
    _, err = _deltakit(*_command(work, tmp_path / "out.sdelta"), code=130)
    assert "interrupted after 5 of 40 evaluations; lowest " in err
    assert err.endswith("nothing is written\nInterrupted.\n")
    assert list(tmp_path.iterdir()) == []
