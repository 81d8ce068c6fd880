"""The settings of a run beside its method: model, data, optimization, evaluation, output."""

from __future__ import annotations

from dataclasses import dataclass

from deltakit.quantized.scheme import COMPUTE_DTYPES, KINDS
from deltakit.training.settings import (
    choice,
    entry_count,
    learning_rate,
    many,
    one_of,
    option,
    real,
    setting,
    text,
    whole,
    yes_or_no,
)
from deltakit.training.tasks import TASKS
from deltakit.training.text_metrics import TEXT_METRICS

MODEL, DATA = "Model", "Data and task"
OPTIMIZATION, EVALUATION, RUN = "Optimization", "Evaluation", "Run"


def _optimizers() -> list[str]:
    from deltakit.training.optimizer_choice import optimizer_names

    return optimizer_names()


def _trackers() -> list[str]:
    from deltakit.training.reporting import tracker_names

    return tracker_names()


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The base, and how it is held."""

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


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The data, and what is learnt from it."""

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


@dataclass(frozen=True, kw_only=True)
class OptimizationSettings:
    """How values are trained."""

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
    batch_size: int = setting(
        16, whole(1), OPTIMIZATION, "examples per forward pass, of all processes together"
    )
    exchange: str = setting(
        "exact",
        one_of("exact", "candidates"),
        OPTIMIZATION,
        "how several processes average the gradients that are selected from",
    )
    sharding: str = setting(
        "none",
        one_of("none", "fsdp"),
        OPTIMIZATION,
        "what each of several processes holds: the whole model, or its rows of every tensor (FSDP2)",
    )
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


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """When and how a run is measured."""

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


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run writes, and what it may use."""

    output_dir: str = setting("", text("RUN"), RUN, "folder for everything the run writes")
    save_steps: int | None = setting(None, whole(1), RUN, "steps between saves for --resume")
    logging_steps: int = setting(10, whole(1), RUN, "steps between lines of the log")
    report_to: tuple[str, ...] = setting(
        (),
        many(choice(_trackers), ","),
        RUN,
        "trackers of the Trainer to report to: tensorboard (into RUN/tensorboard), wandb and others",
    )
    threads: int | None = setting(None, whole(1), RUN, "CPU threads")
