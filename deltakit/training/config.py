"""The settings of a training run: every one declared, documented and checked here, once.

Flags, help, the saved config.yaml and the checks are all made from these declarations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields
from typing import Any

from deltakit.budget import parse_budget
from deltakit.errors import ConfigError, nearest
from deltakit.quantized.scheme import COMPUTE_DTYPES, KINDS, Quantization
from deltakit.registry import Registry
from deltakit.targets.presets import TARGET_PRESETS
from deltakit.training.presets import PRESETS
from deltakit.training.settings import (
    Kind,
    Setting,
    choice,
    entry_count,
    learning_rate,
    many,
    one_of,
    option,
    parse_option,
    parse_setting,
    real,
    setting,
    text,
    whole,
    yes_or_no,
)
from deltakit.training.tasks import TASKS
from deltakit.training.text_metrics import TEXT_METRICS

MODEL, DATA, METHOD, ADAPTER = "Model", "Data and task", "Method", "Adapter"
OPTIMIZATION, EVALUATION, RUN = "Optimization", "Evaluation", "Run"
METHOD_SETTINGS = (
    *("heuristic", "eps", "exp", "precondition"),
    *("schedule", "allocation", "unmask_fraction", "every", "restore"),
    *("rate", "first_rate", "decay"),
    *("num_batches", "num_samples", "labels", "square", "difference"),
    *("dense_steps", "dense_fraction", "dense_lr", "iterations", "probability", "penalty"),
    *("mask", "order", "block_size", "n", "m", "pick", "mask_seed"),
)
REQUIRED = ("model", "data", "task", "budget", "output_dir")


def _methods() -> Registry[Any]:
    from deltakit.selection import METHODS  # imports torch, which help does without

    return METHODS


def _heuristics() -> list[str]:
    from deltakit.selection import HEURISTICS

    return HEURISTICS.names()


def _adapters() -> list[str]:
    from deltakit.adapters.kinds import KINDS

    return KINDS.names()


def _optimizers() -> list[str]:
    from deltakit.training.optimizer_choice import optimizer_names

    return optimizer_names()


def _schedules() -> list[str]:
    from deltakit.selection.schedules import SCHEDULES

    return SCHEDULES.names()


def _allocation(value: Any) -> str | Mapping[str, float]:
    from deltakit.selection.allocation import parse_allocation

    if isinstance(value, Mapping):
        return parse_allocation({str(p): float(share) for p, share in value.items()})
    parse_allocation(str(value))
    return str(value)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of one run; each field's help is in its metadata (`describe`).

    Raises ConfigError naming the setting, what was expected and what was found.
    """

    model: str = setting(
        "", text("MODEL"), MODEL, "base model: a local folder, a Hub id or an hf:// location"
    )
    revision: str | None = setting(None, text(), MODEL, "revision of a Hub model")
    dtype: str = setting(
        "auto",
        one_of("auto", "float32", "bfloat16", "float16", "float64"),
        MODEL,
        "dtype of the weights in training; auto keeps the checkpoint's, so that merging is exact",
    )
    quantize: str | None = setting(
        None,
        one_of(*KINDS),
        MODEL,
        "hold the base's linear weights in 4 or 8 bits; deltas still belong to the full base",
    )
    double_quantization: bool | None = setting(
        None, yes_or_no(), MODEL, "quantise the scales of nf4 and fp4, too"
    )
    compute_dtype: str | None = setting(
        None,
        one_of(*COMPUTE_DTYPES),
        MODEL,
        "dtype in which layers of nf4 and fp4 multiply; that of the weights if unset",
    )
    init_delta: str | None = setting(None, text("DELTA"), MODEL, "delta to go on from")
    avoid: tuple[str, ...] = setting(
        (), many(text("DELTA")), MODEL, "delta whose entries are not to be touched"
    )

    data: str = setting("", text("DATA"), DATA, "data file, folder or `datasets` id")
    data_name: str | None = setting(None, text(), DATA, "configuration of a `datasets` id")
    task: str = setting("", one_of(*TASKS.names()), DATA, "what is learnt")
    train_split: str = setting("train", text(), DATA, "split to train on")
    validation_split: str = setting("validation", text(), DATA, "split to evaluate on")
    validation_fraction: float = setting(
        0.1, real(0, 0.9), DATA, "share held out where the data has no validation split; 0: none"
    )
    text_column: str | None = setting(None, text(), DATA, "column of the text")
    text_pair_column: str | None = setting(None, text(), DATA, "column of the second text")
    label_column: str | None = setting(None, text(), DATA, "column of the label")
    prompt_column: str | None = setting(None, text(), DATA, "column of the prompt")
    completion_column: str | None = setting(None, text(), DATA, "column of the completion")
    messages_column: str | None = setting(None, text(), DATA, "column of the chat messages")
    source_column: str | None = setting(None, text(), DATA, "column of the source text")
    target_column: str | None = setting(None, text(), DATA, "column of the target text")
    choices_column: str | None = setting(None, text(), DATA, "column of the options to choose from")
    image_column: str | None = setting(None, text(), DATA, "column of the image")
    problem_type: str | None = setting(
        None,
        one_of("classification", "regression"),
        DATA,
        "whether labels are classes or numbers; told from the labels by default",
    )
    num_labels: int | None = setting(None, whole(2), DATA, "number of classes")
    max_length: int = setting(512, whole(2), DATA, "tokens per example at most")

    method: str = setting(
        "id3",
        choice(lambda: _methods().names(), "NAME"),
        METHOD,
        "how entries are chosen; docs/settings.md lists the methods",
    )
    preset: str | None = setting(
        None,
        choice(lambda: [*PRESETS, "none"], "NAME"),
        METHOD,
        "named settings, listed in docs/settings.md; METHOD-default if unset",
    )
    budget: str | int = setting(
        "", entry_count(), METHOD, "entries to train: 100k, 0.1% of the base, or 6% of the adapter"
    )
    heuristic: str | None = setting(
        None,
        choice(_heuristics),
        METHOD,
        "what makes an entry worth training, for static, increment, repeat and drop-and-grow",
    )
    eps: float | None = setting(None, real(above=True), METHOD, "eps of the D3 score")
    exp: float | None = setting(None, real(-100, 100), METHOD, "exponent of the D3 score")
    schedule: str | None = setting(
        None, choice(_schedules), METHOD, "how unmasking spreads over the steps"
    )
    allocation: str | Mapping[str, float] | None = setting(
        None,
        Kind(_allocation, "NAME|PATTERN=SHARE,..."),
        METHOD,
        "how the budget is shared among tensors",
    )
    unmask_fraction: float | None = setting(
        None, real(0, 1, above=True), METHOD, "share of all steps that unmask entries"
    )
    precondition: str | None = setting(
        None, one_of("none", "factored"), METHOD, "what the gradient is divided by for scoring"
    )
    every: int | None = setting(None, whole(1), METHOD, "steps from one selection to the next")
    restore: bool | None = setting(
        None, yes_or_no(), METHOD, "whether entries that repeat drops return to their base bits"
    )
    rate: float | None = setting(
        None, real(0, 1), METHOD, "share of entries that drop-and-grow exchanges at first"
    )
    first_rate: float | None = setting(
        None, real(0, 1), METHOD, "share that its very first exchange takes"
    )
    decay: str | None = setting(
        None, one_of("linear", "cosine"), METHOD, "how the exchanged share falls"
    )
    num_batches: int | None = setting(
        None, whole(1), METHOD, "batches whose gradients are summed before training"
    )
    num_samples: int | None = setting(
        None, whole(1), METHOD, "training examples that Fisher information is measured with"
    )
    labels: str | None = setting(
        None,
        one_of("empirical", "model", "expected"),
        METHOD,
        "labels of Fisher information: the data's, drawn from the model, or all by expectation",
    )
    square: bool | None = setting(
        None, yes_or_no(), METHOD, "whether Fisher information squares gradients"
    )
    difference: float | None = setting(
        None, real(above=True), METHOD, "step of grasp where a model has no second derivative: 1e-2"
    )
    dense_steps: int | None = setting(
        None, whole(1), METHOD, "steps of the dense phase before training"
    )
    dense_fraction: float | None = setting(
        None, real(above=True), METHOD, "the same, as a share of the training steps"
    )
    dense_lr: float | None = setting(
        None, real(above=True), METHOD, "learning rate of the dense phase"
    )
    iterations: int | None = setting(
        None, whole(1), METHOD, "dense phases of lt-sft, each of which adds its part of the budget"
    )
    probability: float | None = setting(
        None, real(0, 1, above=True), METHOD, "share of gradients that child-tuning-f keeps"
    )
    penalty: float | None = setting(None, real(), METHOD, "price of an open gate of diff-pruning")
    mask: str | None = setting(
        None, text("DELTA"), METHOD, "delta whose entries method mask trains, `budget` in all"
    )
    order: str | None = setting(
        None,
        one_of("random", "first", "last"),
        METHOD,
        "which rows, columns, heads or blocks a structured mask takes",
    )
    block_size: int | None = setting(None, whole(1), METHOD, "side of a block of method blocks: 16")
    n: int | None = setting(None, whole(1), METHOD, "entries that method n:m takes of a group: 2")
    m: int | None = setting(None, whole(1), METHOD, "consecutive weights in a group of n:m: 4")
    pick: str | None = setting(
        None,
        one_of("random", "largest", "smallest"),
        METHOD,
        "which weights of a group method n:m takes, by magnitude or at random",
    )
    mask_seed: int | None = setting(None, whole(0), METHOD, "seed of a mask; `seed` if unset")
    target: tuple[str, ...] = setting(
        (),
        many(text("PATTERN")),
        METHOD,
        f"tensors to train, by pattern or as {', '.join(TARGET_PRESETS)}; all if unset",
    )
    exclude: tuple[str, ...] = setting(
        (), many(text("PATTERN")), METHOD, "tensors to leave alone, named as those of target"
    )
    extras: tuple[str, ...] = setting(
        (), many(text("PATTERN")), METHOD, "tensors trained densely, beside those the base lacks"
    )
    age: str = setting(
        "entry", one_of("entry", "shared"), METHOD, "Adam's step count: per entry, or one for all"
    )

    adapter: str | None = setting(
        None,
        choice(_adapters),
        ADAPTER,
        "train entries of an adapter at the layers of target; docs/methods.md lists them",
    )
    rank: int | None = setting(None, whole(1), ADAPTER, "rank of the adapter, where it has one")
    adapter_options: tuple[str, ...] = setting(
        (), many(option()), ADAPTER, "option of the adapter, such as alpha=32 or reduction_factor=4"
    )
    adapter_seed: int | None = setting(
        None, whole(0), ADAPTER, "seed of the adapter's initial values; `seed` if unset"
    )
    loftq: bool | None = setting(
        None,
        yes_or_no(),
        ADAPTER,
        "start lora at a quantised base from what quantising has lost (LoftQ)",
    )
    masked: str = setting(
        "initial",
        one_of("initial", "zero"),
        ADAPTER,
        "what the adapter's other entries are: their initial values, or zero (SparseAdapter)",
    )

    lr: float | str = setting(
        1e-3,
        learning_rate(),
        OPTIMIZATION,
        "learning rate of the entries; auto finds it by a short sweep",
    )
    head_lr: float = setting(5e-3, real(above=True), OPTIMIZATION, "learning rate of the extras")
    optimizer: str = setting(
        "adamw", choice(_optimizers), OPTIMIZATION, "adamw, adamw8bit or one of torch.optim"
    )
    optimizer_options: tuple[str, ...] = setting(
        (), many(option()), OPTIMIZATION, "option of the optimizer, such as momentum=0.9"
    )
    weight_decay: float = setting(0.0, real(), OPTIMIZATION, "decay of the delta towards the base")
    warmup: float = setting(
        0.0, real(), OPTIMIZATION, "warm-up steps; a share of all steps if below 1"
    )
    scheduler: str = setting(
        "linear",
        one_of("linear", "cosine", "constant", "constant_with_warmup"),
        OPTIMIZATION,
        "how the learning rate falls",
    )
    epochs: float = setting(3.0, real(above=True), OPTIMIZATION, "passes over the training data")
    max_steps: int | None = setting(
        None, whole(1), OPTIMIZATION, "optimizer steps, instead of epochs"
    )
    batch_size: int = setting(16, whole(1), OPTIMIZATION, "examples per forward pass")
    gradient_accumulation: int = setting(
        1, whole(1), OPTIMIZATION, "forward passes per optimizer step"
    )
    mixed_precision: str = setting(
        "no", one_of("no", "bf16"), OPTIMIZATION, "compute in bfloat16 where it is safe"
    )
    gradient_clipping: float | None = setting(
        None, real(above=True), OPTIMIZATION, "largest gradient norm of entries and extras"
    )
    seed: int = setting(0, whole(0), OPTIMIZATION, "seed of the data order, new heads and masks")

    checkpoint_budgets: tuple[str | int, ...] = setting(
        (),
        many(entry_count(), ","),
        EVALUATION,
        "budgets at which a delta is written and evaluated",
    )
    eval_strategy: str = setting(
        "epoch",
        one_of("epoch", "steps", "budget", "no"),
        EVALUATION,
        "when to evaluate beside the end; budget: at the marks only",
    )
    eval_steps: int | None = setting(None, whole(1), EVALUATION, "steps between evaluations")
    eval_batch_size: int = setting(32, whole(1), EVALUATION, "examples per evaluation pass")
    metric: str | None = setting(
        None, text("NAME"), EVALUATION, "metric that names the best delta; the task's by default"
    )
    generate_metrics: tuple[str, ...] = setting(
        (),
        many(one_of(*TEXT_METRICS), ","),
        EVALUATION,
        "scores of what the model writes by itself, greedily",
    )
    max_new_tokens: int = setting(
        64, whole(1), EVALUATION, "tokens that the model writes for generate_metrics at most"
    )
    hessian: bool | None = setting(
        None,
        yes_or_no(),
        EVALUATION,
        "measure the Hessian's norm on the support and on parts of it, at the end",
    )
    early_stopping_patience: int | None = setting(
        None, whole(1), EVALUATION, "evaluations without a better metric before training stops"
    )

    output_dir: str = setting("", text("RUN"), RUN, "folder for everything the run writes")
    save_steps: int | None = setting(None, whole(1), RUN, "steps between saves for --resume")
    logging_steps: int = setting(10, whole(1), RUN, "steps between lines of the log")
    threads: int | None = setting(None, whole(1), RUN, "CPU threads")

    def __post_init__(self) -> None:
        described = describe()
        for name in REQUIRED:
            if getattr(self, name) == "":
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"setting {name} is missing; give {flag} or name it in the file")
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                checked = parse_setting(field.name, described[field.name], value)
                object.__setattr__(self, field.name, checked)
        self._check_together()

    def _check_together(self) -> None:
        if self.eval_strategy == "steps" and self.eval_steps is None:
            raise ConfigError("eval_strategy steps needs eval_steps")
        if self.warmup and self.scheduler == "constant":
            raise ConfigError("scheduler constant has no warm-up; use constant_with_warmup")
        if self.early_stopping_patience and self.eval_strategy == "no":
            raise ConfigError("early_stopping_patience needs evaluation; eval_strategy is no")
        if self.adapter is None:
            for name in ("rank", "adapter_options", "adapter_seed"):
                if getattr(self, name):
                    raise ConfigError(f"setting {name} needs an adapter; give --adapter")
        if self.loftq and (self.adapter != "lora" or self.quantize is None):
            raise ConfigError(
                "loftq starts lora at a quantised base; give --adapter lora and --quantize"
            )
        if self.quantization is not None and self.hessian:
            raise ConfigError("hessian is measured on full-precision weights; leave out --quantize")
        accepted = self._accepted()
        with_ = f" with heuristic {self.heuristic}" if "heuristic" in accepted else ""
        for name in METHOD_SETTINGS:
            if getattr(self, name) is not None and name not in accepted:
                raise ConfigError(
                    f"setting {name} does not apply to method {self.method}"
                    f"{with_ if self.heuristic else ''}; docs/settings.md says which settings do"
                )

    @property
    def quantization(self) -> Quantization | None:
        """How the base is quantised, if it is."""
        return Quantization.of(
            self.quantize, double=self.double_quantization, compute_dtype=self.compute_dtype
        )

    def method_settings(self) -> dict[str, Any]:
        """The settings that make the method, unset ones as None; the seed included."""
        made = {name: getattr(self, name) for name in self._accepted()}
        mask_seed = made.pop("mask_seed", None)
        return made if mask_seed is None else {**made, "seed": mask_seed}

    def _accepted(self) -> list[str]:
        """The settings that the method takes, where a seed of its own may stand for the run's."""
        from deltakit.selection.recipe import settings_of

        taken = settings_of(self.method, self.heuristic)
        names = [name for name in (*METHOD_SETTINGS, "seed") if name in taken]
        return [*names, "mask_seed"] if "seed" in names else names

    def adapter_settings(self) -> dict[str, Any]:
        """The options that make the adapter, unset ones left out."""
        given = dict(parse_option(each) for each in self.adapter_options)
        return given if self.rank is None else {**given, "rank": self.rank}

    def as_dict(self) -> dict[str, Any]:
        """All settings as plain YAML values, in order of declaration."""
        values = asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def budgets(self, total_weights: int) -> tuple[int, list[int]]:
        """The resolved budget and its marks, rising; ConfigError for a mark above the budget.

        total_weights: what a share is one of: the base's, with an adapter the adapter's.
        """
        whole_budget = parse_budget(self.budget, total_weights)
        marks = sorted({parse_budget(mark, total_weights) for mark in self.checkpoint_budgets})
        if marks and not 0 < marks[0] <= marks[-1] <= whole_budget:
            raise ConfigError(
                f"checkpoint_budgets {marks} must lie between 1 and the budget {whole_budget}"
            )
        return whole_budget, marks


def describe() -> dict[str, Setting]:
    """Every setting's description, in order of declaration."""
    return {field.name: _described(field) for field in fields(TrainConfig)}


def _described(field: Field[Any]) -> Setting:
    described: Setting = field.metadata["setting"]
    return described


def check_names(given: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for a name that is no setting, with the nearest that are."""
    known = list(describe())
    for name in given:
        if name not in known:
            hint = nearest(str(name), known) or "; see deltakit train --help"
            raise ConfigError(f"{where}: unknown setting {name!r}{hint}")
