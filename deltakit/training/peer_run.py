"""Training a peer: the plain `transformers.Trainer` with `torch.optim.AdamW`.

Data and their order, batches, schedule, evaluation and the freshly drawn head are those that a run
of deltakit with the same settings has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import PrinterCallback, Trainer

from deltakit.errors import ConfigError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.live.coordinates import checkpoint_names
from deltakit.training.build import arguments, exclusions, feeding
from deltakit.training.config import TrainConfig
from deltakit.training.folder import RunFolder
from deltakit.training.memory import PeakMemory
from deltakit.training.peers import LINEAR, PEERS, Result, Subject
from deltakit.training.prepare import Prepared, Say, prepare
from deltakit.training.pretrained import load_model, with_weights
from deltakit.training.quiet import quieten
from deltakit.training.report import write_metrics
from deltakit.training.reporting import keep_events_in
from deltakit.training.settings import AUTO
from deltakit.training.targets import choose_targets
from deltakit.training.watch import metrics_of

ADAPTER = "adapter.safetensors"  # what a peer adds to the base, its head included


def train_peer(
    name: str,
    config: TrainConfig,
    say: Say = lambda text: None,
    examine: Callable[[Trainer], Mapping[str, Any]] = lambda trainer: {},
) -> dict[str, Any]:
    """Train a peer as the settings say and write metrics.json into `config.output_dir`.

    config: `lr` is the peer's own rate, `head_lr` that of the head; target and exclude choose its
    layers; the method is not used. examine: what else is to be recorded of the trained model.
    Raises the typed errors of `deltakit.errors`.
    """
    started = time.monotonic()
    if config.lr == AUTO:
        raise ConfigError(f"peer {name}: lr auto is for entries; give a number")
    folder = RunFolder(Path(config.output_dir))
    folder.path.mkdir(parents=True, exist_ok=True)
    quieten()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    prepared = prepare(config, say)
    base = Checkpoint(with_weights(prepared.located).folder)
    config.budgets(base.total_weights)  # refused before the model is loaded
    transformers.set_seed(config.seed)
    model = load_model(
        prepared.located, prepared.config, prepared.problem, config.dtype, config.quantization
    )
    memory, training = PeakMemory(), time.monotonic()
    trainer, result = _trainer(name, model, config, prepared, base, folder)
    trainer.train()
    cost = {
        "resumed": False,
        "train_seconds": round(time.monotonic() - training, 3),
        "peak_bytes_above_model": memory.above(),
    }
    record = _results(name, config, prepared, base, trainer)
    record["final"] |= _written(folder.path / ADAPTER, model, result, trainer.extras)
    record |= {**examine(trainer), **cost, "seconds": round(time.monotonic() - started, 3)}
    write_metrics(record, folder.metrics)
    return record


def _trainer(
    name: str,
    model: Any,
    config: TrainConfig,
    prepared: Prepared,
    base: Checkpoint,
    folder: RunFolder,
) -> tuple[PeerTrainer, Result | None]:
    """The trainer of a model that the peer has got ready, and how to get the result."""
    budget, _ = config.budgets(base.total_weights)
    extras, subject = _subject(model, config, base, budget)
    if name == "head" and not extras:
        raise ConfigError("peer head: the base has its head already; name what to train by extras")
    result = PEERS[name](subject)
    for parameter in extras.values():
        parameter.requires_grad = True
    trainer = PeerTrainer(
        model,
        # An interrupted peer starts anew, so nothing is saved on the way.
        arguments(replace(config, save_steps=None), folder, len(prepared.examples["train"])),
        extras=extras,
        extras_lr=config.head_lr,
        **feeding(config, prepared, model),
    )
    trainer.remove_callback(PrinterCallback)  # prints to stdout, which is for results
    keep_events_in(trainer, folder.events)
    return trainer, result


def _results(
    name: str, config: TrainConfig, prepared: Prepared, base: Checkpoint, trainer: PeerTrainer
) -> dict[str, Any]:
    """What metrics.json has in common with that of a run of deltakit."""
    trained = sum(p.numel() for p in trainer.trained())
    extras = trainer.extras
    return {
        "version": 1,
        "task": config.task,
        "method": name,
        "metric": prepared.metric,
        "budget": {
            "given": config.budget,
            "resolved": config.budgets(base.total_weights)[0],
            "reached": trained,
        },
        "extras": {"weights": sum(p.numel() for p in extras.values()), "names": list(extras)},
        "final": {
            "entries": trained,
            "step": trainer.state.global_step,
            "metrics": _metrics(trainer, prepared),
        },
    }


class PeerTrainer(Trainer):
    """The Trainer with `torch.optim.AdamW`, and another rate for what the base lacks."""

    def __init__(
        self, *args: Any, extras: dict[str, torch.nn.Parameter], extras_lr: float, **kwargs: Any
    ) -> None:
        self.extras, self._extras_lr = extras, extras_lr
        super().__init__(*args, **kwargs)

    def trained(self) -> list[torch.nn.Parameter]:
        """What is trained beside the extras."""
        assert self.model is not None
        own = {id(p) for p in self.extras.values()}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over everything trainable."""
        groups = [
            {"params": self.trained(), "lr": self.args.learning_rate},
            {"params": list(self.extras.values()), "lr": self._extras_lr},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            weight_decay=self.args.weight_decay,
        )
        return self.optimizer


def _subject(
    model: torch.nn.Module, config: TrainConfig, base: Checkpoint, budget: int
) -> tuple[dict[str, torch.nn.Parameter], Subject]:
    """What the base lacks, by live name, and the linear layers whose weights are targets."""
    names = checkpoint_names(model, base)
    excluded = exclusions(config, model, base)
    targets, extra_names = choose_targets(
        model, names, config.target or None, excluded, config.extras
    )
    wanted = {target.live_name for target in targets}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LINEAR) and f"{name}.weight" in wanted
    }
    live = dict(model.named_parameters())
    extras = {name: live[name] for name in extra_names}
    return extras, Subject(model, budget, config.seed, layers)


def _metrics(trainer: Trainer, prepared: Prepared) -> dict[str, float]:
    """The evaluation of the last step, made now where nothing has made it yet."""
    for record in reversed(trainer.state.log_history):
        if record["step"] == trainer.state.global_step and metrics_of(record):
            break
    else:
        record = trainer.evaluate()
    found = metrics_of(record)
    return {name: found[name] for name in prepared.problem.metric_names if name in found}


def _written(
    path: Path,
    model: torch.nn.Module,
    result: Result | None,
    extras: dict[str, torch.nn.Parameter],
) -> dict[str, Any]:
    """Path and bytes of the result; of a whole checkpoint the bytes that it would have."""
    if result is None:
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
        return {"path": None, "bytes": sum(t.numel() * t.element_size() for t in tensors.values())}
    told = {**result(), **{name: p.detach() for name, p in extras.items()}}
    save_file({name: tensor.cpu().contiguous() for name, tensor in told.items()}, path)
    return {"path": str(path), "bytes": path.stat().st_size}
