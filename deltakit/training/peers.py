"""Peers to compare with: full fine-tuning, the head alone, and adapters of the `peft` library.

Each is trained by the plain `transformers.Trainer` with `torch.optim.AdamW`, on the data, order,
batches, schedule, evaluation and freshly drawn head that a run of deltakit has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import PrinterCallback, Trainer

from deltakit.errors import BudgetError, ConfigError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.registry import Registry
from deltakit.training.build import arguments, exclusions, feeding
from deltakit.training.config import TrainConfig
from deltakit.training.coordinates import checkpoint_names
from deltakit.training.folder import RunFolder
from deltakit.training.memory import PeakMemory
from deltakit.training.prepare import Prepared, Say, prepare
from deltakit.training.pretrained import load_model, with_weights
from deltakit.training.quiet import quieten
from deltakit.training.report import write_metrics
from deltakit.training.targets import choose_targets
from deltakit.training.watch import metrics_of

ADAPTER = "adapter.safetensors"  # what a peer adds to the base, its head included


@dataclass(frozen=True, slots=True)
class Patient:
    """A model that a peer works on. layers: the linear layers among the targets, by name."""

    model: torch.nn.Module
    budget: int
    seed: int
    layers: Mapping[str, Any]


# Makes weights trainable, and tells how to get those of the result beside the head, once trained;
# None: all of the model.
Result = Callable[[], dict[str, torch.Tensor]]
Prepare = Callable[[Patient], "Result | None"]
PEERS: Registry[Prepare] = Registry("peer")
RATES = {"full": 5e-5, "lora": 5e-4, "shira": 1e-2}  # those of the head: `head_lr`
_LINEAR = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)


@PEERS.register("full", "all weights, densely")
def full(patient: Patient) -> None:
    """Leave every weight trainable; the result is a whole checkpoint."""
    patient.model.requires_grad_(requires_grad=True)


@PEERS.register("head", "what the base lacks, alone")
def head(patient: Patient) -> Result:
    """Freeze all; the head is made trainable for every peer alike."""
    patient.model.requires_grad_(requires_grad=False)
    return dict


@PEERS.register("lora", "low-rank adapters of peft on the same targets", "LoRA, Hu et al. 2022")
def lora(patient: Patient) -> Result:
    """LoRA without dropout at alpha = 2 r, of the largest rank that the budget allows."""
    rank, names = largest_rank(patient, _LINEAR)
    options = {"lora_alpha": 2 * rank, "fan_in_fan_out": _transposed(patient)}
    return _injected(patient.model, _peft().LoraConfig(r=rank, target_modules=names, **options))


@PEERS.register("shira", "random sparse adapters of peft", "SHiRA, Bhardwaj et al. 2024")
def shira(patient: Patient) -> Result:
    """SHiRA with random masks, of the largest rank that the budget allows."""
    rank, names = largest_rank(patient, (torch.nn.Linear,))
    config = _peft().ShiraConfig(r=rank, random_seed=patient.seed, target_modules=names)
    return _injected(patient.model, config)


def largest_rank(patient: Patient, kinds: tuple[type, ...]) -> tuple[int, list[str]]:
    """The rank whose number of weights is nearest to the budget and not above it, and the layers.

    An adapter of rank r has r * (rows + columns) weights per layer. kinds: classes of layers that
    it can be put on. Raises BudgetError where even rank 1 is above, ConfigError without layers.
    """
    shapes = {n: m.weight.shape for n, m in patient.layers.items() if isinstance(m, kinds)}
    smallest = sum(rows + columns for rows, columns in shapes.values())
    if not smallest:
        raise ConfigError("adapters need linear layers among the targets, found none")
    if patient.budget < smallest:
        raise BudgetError(
            f"adapters of rank 1 on the {len(shapes)} targeted layers have {smallest:,} "
            f"weights, above the budget of {patient.budget:,}; raise it or narrow the target"
        )
    return patient.budget // smallest, list(shapes)


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
    folder = RunFolder(Path(config.output_dir))
    folder.path.mkdir(parents=True, exist_ok=True)
    quieten()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    prepared = prepare(config, say)
    base = Checkpoint(with_weights(prepared.located).folder)
    budget, _ = config.budgets(base.total_weights)
    transformers.set_seed(config.seed)
    model = load_model(prepared.located, prepared.config, prepared.problem, config.dtype)
    memory, training = PeakMemory(), time.monotonic()
    extras, patient = _patient(model, config, base, budget)
    if name == "head" and not extras:
        raise ConfigError("peer head: the base has its head already; name what to train by extras")
    result = PEERS[name](patient)
    live = dict(model.named_parameters())
    for parameter in extras.values():
        parameter.requires_grad = True
    trainer = PeerTrainer(
        model,
        arguments(config, folder, len(prepared.examples["train"])),
        extras=list(extras.values()),
        extras_lr=config.head_lr,
        **feeding(config, prepared, model),
    )
    trainer.remove_callback(PrinterCallback)  # prints to stdout, which is for results
    trainer.train()
    cost = {
        "resumed": False,
        "train_seconds": round(time.monotonic() - training, 3),
        "peak_bytes_above_model": memory.above(),
    }
    own = {id(p) for p in extras.values()}
    trained = sum(p.numel() for p in live.values() if p.requires_grad and id(p) not in own)
    head_weights = sum(p.numel() for p in extras.values())
    record = {
        "version": 1,
        "task": config.task,
        "method": name,
        "metric": prepared.metric,
        "budget": {"given": config.budget, "resolved": budget, "reached": trained},
        "extras": {"weights": head_weights, "names": list(extras)},
        "final": {
            "entries": trained,
            "step": trainer.state.global_step,
            "metrics": _metrics(trainer, prepared),
            **_written(folder.path / ADAPTER, model, result, extras),
        },
        **examine(trainer),
        **cost,
        "seconds": round(time.monotonic() - started, 3),
    }
    write_metrics(record, folder.metrics)
    return record


class PeerTrainer(Trainer):
    """The Trainer with `torch.optim.AdamW`, and another rate for what the base lacks."""

    def __init__(
        self, *args: Any, extras: Sequence[torch.Tensor], extras_lr: float, **kwargs: Any
    ) -> None:
        self._extras, self._extras_lr = extras, extras_lr
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over everything trainable."""
        live = self.model if model is None else model
        assert live is not None
        own = {id(p) for p in self._extras}
        rest = [p for p in live.parameters() if p.requires_grad and id(p) not in own]
        groups = [
            {"params": rest, "lr": self.args.learning_rate},
            {"params": list(self._extras), "lr": self._extras_lr},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            weight_decay=self.args.weight_decay,
        )
        return self.optimizer


def _patient(
    model: torch.nn.Module, config: TrainConfig, base: Checkpoint, budget: int
) -> tuple[dict[str, torch.nn.Parameter], Patient]:
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
        if isinstance(module, _LINEAR) and f"{name}.weight" in wanted
    }
    live = dict(model.named_parameters())
    extras = {name: live[name] for name in extra_names}
    return extras, Patient(model, budget, config.seed, layers)


def _transposed(patient: Patient) -> bool:
    """Whether the layers keep their weights as GPT-2 does, [in, out]."""
    return not any(isinstance(layer, torch.nn.Linear) for layer in patient.layers.values())


def _peft() -> Any:
    if find_spec("peft") is None:
        raise ConfigError(
            "lora and shira need peft, which is not installed; pip install 'deltakit-sparse[peers]'"
        )
    import peft

    return peft


def _injected(model: torch.nn.Module, config: Any) -> Result:
    """Put adapters into a model, whose own class stays, and freeze the rest."""
    peft = _peft()
    peft.inject_adapter_in_model(config, model)
    return lambda: dict(peft.get_peft_model_state_dict(model, save_embedding_layers=False))


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
