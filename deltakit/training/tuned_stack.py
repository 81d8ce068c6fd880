"""`tune_weights`: a stack with the weights that do best on validation data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from deltakit.adapters.refusal import MERGE, refuse_adapters
from deltakit.combine.method import METHODS, make_method, option_names
from deltakit.delta import SparseDelta
from deltakit.errors import ConfigError, nearest
from deltakit.formats.checkpoint import Checkpoint
from deltakit.merging.inputs import Given, read_inputs
from deltakit.stacking import read_tasks, stack_inputs
from deltakit.training.evaluate import EvaluateConfig, Evaluator
from deltakit.training.metrics import greater_is_better
from deltakit.training.prepare import Say
from deltakit.training.pretrained import locate, with_weights
from deltakit.training.weight_evaluation import LOSS, StackEvaluation, choose_objective
from deltakit.weight_search import (
    Evaluation,
    WeightSearch,
    best_of,
    check_search,
    search_weights,
    show,
)


@dataclass(frozen=True, slots=True)
class TunedStack:
    """What `tune_weights` found: the stack with the best weights, and how they were found."""

    delta: SparseDelta
    search: WeightSearch


def tune_weights(
    deltas: Given | Sequence[Given],
    method: str = "linear",
    *,
    model: str | Path,
    data: str | Path,
    task: str,
    split: str = "validation",
    objective: str = LOSS,
    evaluations: int = 40,
    seed: int = 0,
    bounds: tuple[float, float] = (-1.5, 1.5),
    regularization: float = 0.05,
    head: int | str | Path | None = None,
    allow_base_mismatch: bool = False,
    settings: Mapping[str, Any] | None = None,
    say: Say = lambda text: None,
    **options: Any,
) -> TunedStack:
    """Stack deltas with the weights that do best on validation data, found without gradients.

    The idea is that of Huang et al., "LoraHub" (2023): the weights are few, so a black-box
    optimizer can tune them on a small set of examples. `deltakit.weight_search` says what is
    minimised and how. Base and data are read once; for each choice of weights the deltas are
    stacked in the sparse domain, applied, measured, and taken back bit for bit.

    deltas, method, head, options (density, flavour, ...): see `deltakit.stack`; one weight for
    each delta. model: the base, a folder or Hub id; all deltas are checked against it. data, task:
    as for `deltakit evaluate`, whose other settings (`max_length`, `eval_batch_size`, ...) may
    stand in `settings`. split: a validation split that the data lacks is held out as in training.
    objective: the task's loss (squared error where labels are numbers) or another of its metrics; a
    loss is smooth in the weights and leads a search better. seed: of the search, and of methods
    that draw at random. evaluations, bounds, regularization: see `search_weights`. say: told of
    every evaluation, and of the time that is left.

    The delta is the one that `stack` makes with those weights; its provenance keeps the search.
    All but the model is checked before the model is loaded. Interrupted, it says what was best so
    far and stops. Raises what `stack`, `search_weights` and an evaluation raise.
    """
    inputs = read_inputs(deltas)
    refuse_adapters([each.delta.adapter for each in inputs], "stacking", MERGE)
    check_search(len(inputs), evaluations, bounds, regularization)
    config = _config({**(settings or {}), "model": str(model), "data": str(data), "task": task})
    if "seed" in option_names(METHODS[method]):
        options.setdefault("seed", seed)
    flavour = options.pop("flavour", "paper")
    maker = make_method(method, flavour, options)
    base = Checkpoint(with_weights(locate(config.model, config.revision)).folder)
    stacked = partial(
        stack_inputs,
        inputs,
        method,
        options=options,
        flavour=flavour,
        head=head,
        base=base,
        allow_base_mismatch=allow_base_mismatch,
    )
    plain = stacked(weights=None)
    ready = Evaluator.of(config, [plain], split, say)
    metric = choose_objective(ready.problem.metric_names, objective)
    tasks = read_tasks(inputs, None, base)
    measure = StackEvaluation(ready, tasks, maker, plain.extras, metric)
    _ = ready.model  # loaded now, so that the first evaluation's seconds are its own
    with _told(evaluations, metric, say) as tell:
        search = search_weights(
            measure,
            len(inputs),
            objective=metric,
            greater=greater_is_better(metric),
            evaluations=evaluations,
            seed=seed,
            bounds=bounds,
            regularization=regularization,
            say=tell,
        )
    best = stacked(weights=search.weights)
    record = {**search.record(), **_measured_on(ready)}
    return TunedStack(replace(best, provenance={**best.provenance, "search": record}), search)


def _config(settings: dict[str, Any]) -> EvaluateConfig:
    known = [field.name for field in fields(EvaluateConfig)]
    for name in settings:
        if name not in known:
            raise ConfigError(f"an evaluation has no setting {name!r}{nearest(name, known)}")
    return EvaluateConfig(**settings)


@contextmanager
def _told(total: int, metric: str, say: Say) -> Iterator[Callable[[Evaluation], None]]:
    """Say one line per evaluation; interrupted, say what was best, so that no work is lost."""
    made: list[Evaluation] = []

    def tell(new: Evaluation) -> None:
        made.append(new)
        usual = median(e.seconds for e in made)  # the first one warms up
        minutes, seconds = divmod(round(usual * (total - len(made))), 60)
        lowest = " (lowest so far)" if best_of(made) is new else ""
        say(
            f"{new.number}/{total} {new.origin} {show(new.weights)}: {metric} "
            f"{new.metrics[metric]:.4f}, minimised {new.value:.4f}{lowest}; "
            f"{new.seconds:.1f} s, {minutes}:{seconds:02d} left"
        )

    try:
        yield tell
    except (KeyboardInterrupt, SystemExit):
        if made:
            best = best_of(made)
            say(
                f"interrupted after {len(made)} of {total} evaluations; lowest {best.value:.4f}, "
                f"with weights {show(best.weights)}; nothing is written"
            )
        raise


def _measured_on(ready: Evaluator) -> dict[str, Any]:
    """The data of a search; a file that travels tells no folders of its maker."""
    given = {name: getattr(ready.config, name) for name in ("model", "data")}
    told = {name: Path(at).name if Path(at).exists() else at for name, at in given.items()}
    where = {"task": ready.config.task, "split": ready.split, "examples": len(ready.examples)}
    return {**told, **where}
