"""`SparseTuner`: train an exactly budgeted set of a model's weights in any training loop."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from deltakit.delta import SparseDelta
from deltakit.errors import ConfigError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.sdelta import save
from deltakit.live.coordinates import (
    config_changes,
    coordinates,
    live_tensors,
    open_base,
    refuse_rearranged,
    saved_buffers,
)
from deltakit.live.translation import settled
from deltakit.parallel.agreement import check_agreement, check_split_agreement
from deltakit.parallel.averaging import Exchange
from deltakit.parallel.processes import is_first
from deltakit.parallel.ranks import Ranks
from deltakit.parallel.shards import Shards, reshard
from deltakit.quantized.layers import quantization_of
from deltakit.selection.fixed import Unresolved, resolved
from deltakit.selection.methods import Method
from deltakit.selection.scene import Calibration, Scene
from deltakit.training.adapted import Masked, adapter_training
from deltakit.training.any_optimizer import Factory
from deltakit.training.engine import Engine
from deltakit.training.entries import Entries
from deltakit.training.extra import make_extra
from deltakit.training.gradient_path import GradientPath
from deltakit.training.live_identity import LiveIdentity
from deltakit.training.make_delta import Record, make_delta
from deltakit.training.optimizer import Age
from deltakit.training.optimizer_choice import make_optimizer
from deltakit.training.resharding import resharded
from deltakit.training.shard_target import split_targets
from deltakit.training.support import continue_from, continued, enter, keep_clear
from deltakit.training.target import Target
from deltakit.training.targets import choose_targets

if TYPE_CHECKING:
    from deltakit.adapters.attach import Attached


class SparseTuner:
    """Trains `method.budget` entries of a model, exactly, and hands them out as a delta.

    Any loop: `loss.backward(); tuner.step()`; `step` selects, updates, writes through and clears
    gradients. Live weights always are round(base + delta), so the model is always merged.

    method: `dk.ID3(...)`, `dk.RandomMask(...)`. lr, weight_decay: of the entries; extras_lr: the
    extras' own rate (lr by default). optimizer: "adamw" (`SparseAdamW`, which takes betas, adam_eps
    and age), the name of another, a torch.optim class or a function that makes an optimizer
    (see `AnyOptimizer`); optimizer_options: its own arguments.
    target, exclude: patterns or presets (`targets.patterns.matching`) for tensors that may be
    trained; all floating-point tensors by default. extras: patterns for tensors trained densely,
    outside the budget; tensors that the base lacks and buffers that training changes (BatchNorm
    statistics) always are extras.
    accumulation_steps: backward passes per step. max_grad_norm: clips the gradients of chosen
    entries and extras. total_steps: optimizer steps of the whole run, where the method needs it.
    budget_checkpoints: counts of entries at which unmasking pauses for one step.
    base: the checkpoint (path or `Checkpoint`) the model was loaded from; found through the model
    by default; without one, live names and dtypes are the coordinates. init_delta: a delta to
    continue from, its entries counted in the budget. avoid: deltas whose support stays untouched.
    calibration: passes over the data, for methods that measure before training (`dk.Batches`).
    adapter: an adapter attached to the model (`dk.attach`), whose tensors alone are trained then, from
    their initial values. masked: what its entries outside the support are, "initial" (as any
    weight that is not chosen) or "zero" (SparseAdapter, He et al. 2022).
    exchange: under an initialised default group of torch.distributed, whose ranks' gradients are
    averaged, how a step that selects does so: "exact" or by "candidates" (see `Averaging`).
    model_id, revision, config, provenance: recorded in the delta.

    Raises ConfigError, BudgetError, CoordinateError or BaseMismatchError before anything changes.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        method: Method | Unresolved,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        optimizer: str | Factory = "adamw",
        optimizer_options: Mapping[str, Any] | None = None,
        target: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] = (),
        extras: str | Iterable[str] = (),
        extras_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        age: Age = "entry",
        max_grad_norm: float | None = None,
        accumulation_steps: int = 1,
        total_steps: int | None = None,
        budget_checkpoints: Sequence[int] = (),
        base: str | os.PathLike[str] | Checkpoint | None = None,
        init_delta: SparseDelta | None = None,
        avoid: Sequence[SparseDelta] = (),
        calibration: Calibration | None = None,
        adapter: Attached | None = None,
        masked: Masked = "initial",
        exchange: Exchange = "exact",
        model_id: str | None = None,
        revision: str | None = None,
        config: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        if accumulation_steps < 1:
            raise ConfigError(f"accumulation_steps must be at least 1, found {accumulation_steps}")
        self.model = model
        self._shards = Shards.of(model)
        self.checkpoint = open_base(model, base)
        adapted = adapter_training(adapter, self.checkpoint, masked, init_delta)
        where = adapter.where if adapter else coordinates(model, self.checkpoint, buffers=True)
        names = {n: where.names[n] for n, _ in model.named_parameters()}
        buffers = {where.names[n] or n: b for n, b in saved_buffers(model).items()}
        among = adapted.live_names if adapted else None
        targets, extra_names = choose_targets(model, names, target, exclude, extras, among)
        self._requires_grad = {n: p.requires_grad for n, p in model.named_parameters()}
        identity = LiveIdentity(model, targets, where, self.checkpoint, model_id, revision)
        live, tensors = dict(model.named_parameters()), live_tensors(model)
        keep_clear(targets, [settled(each, where, tensors) for each in avoid])
        earlier = None if init_delta is None else settled(init_delta, where, tensors)
        refuse_rearranged(extra_names, where)
        kept = [make_extra(names[n] or n, live[n], self._shards) for n in extra_names]
        scene = Scene(
            targets=targets,
            total_steps=total_steps,
            marks=budget_checkpoints,
            extras=[extra.parameter for extra in kept],
            model=model,
            calibration=calibration,
            is_split=self._shards is not None,
        )
        scene = continued(scene, targets, earlier)
        self.method = resolved(method, scene)
        if adapted:
            adapted.check_method(self.method)
        entries = self._entries(targets)
        if earlier is not None:
            identity.check(earlier)
            continue_from(earlier, entries, kept)
        start = self.method.start(scene)
        if self._shards:
            budget = self.method.budget
            check_split_agreement(self._shards.ranks, budget, targets, start.support)
        if adapted:
            adapted.check_support(start, targets)
        if adapted and masked == "zero":
            start = adapted.prune(start, targets)
            identity.take_samples()
        enter(start.support, entries)
        for name, parameter in live.items():
            parameter.requires_grad_(name in set(extra_names))
        ranks = None if self._shards else Ranks.together()
        self.engine = Engine(
            entries,
            kept,
            start.selector,
            model=model,
            frozen=start.frozen,
            buffers=buffers,
            accumulation_steps=accumulation_steps,
            max_grad_norm=max_grad_norm,
            ranks=ranks,
            exchange=exchange,
            shards=self._shards,
        )
        entries.write_through()
        if ranks:
            check_agreement(ranks, entries, kept)
        self.optimizer = make_optimizer(
            self.engine,
            optimizer,
            optimizer_options,
            lr=0.0 if start.frozen else lr,
            extras_lr=lr if extras_lr is None else extras_lr,
            betas=betas,
            eps=adam_eps,
            weight_decay=weight_decay,
            age=age,
        )
        changes = config_changes(model, self.checkpoint) if self.engine.extras else {}
        how = quantization_of(model)
        told = {} if how is None else {"quantization": how.as_dict()}
        self._record = Record(
            where,
            identity,
            adapted,
            self.method.budget,
            config=changes if config is None else dict(config),
            provenance={**(provenance or {}), **told},
        )

    @property
    def unmasked(self) -> int:
        """Entries in training so far."""
        return self.engine.unmasked

    @property
    def gradient_paths(self) -> dict[str, GradientPath]:
        """By tensor with entries: "sampled", "submatrix" or "dense" products give their gradients.

        All dense while the support changes; then what `training.gradient_path` finds cheapest.
        """
        return self.engine.paths

    @property
    def budget(self) -> int:
        """Entries that will be in training once selection is over."""
        return self.method.budget

    def step(self) -> None:
        """Select, update, write through, clear gradients: all of one optimizer step."""
        self.optimizer.step()

    def delta(self) -> SparseDelta:
        """The entries trained so far, as a delta in checkpoint coordinates.

        Merged into the base it gives the live model's bits. Of a sharded model all processes must
        ask together, and all get the whole delta.
        """
        delta = make_delta(self.engine, self._record, self._shards)
        assert delta is not None
        return delta

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the delta to a file; of several processes, which call together, the first writes.

        Of a sharded model no other process holds more entries than its own.
        """
        delta = make_delta(self.engine, self._record, self._shards, everywhere=False)
        if delta is not None and is_first():
            save(delta, path)

    @property
    def is_sharded(self) -> bool:
        """Whether this process holds, by FSDP2, a part of the model and of its entries only."""
        return self._shards is not None

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume on a freshly loaded base, bit for bit.

        Of a sharded model what this process holds.
        """
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """Resume from `state_dict`; the live model takes the state's weights.

        The states of all processes of a sharded run, by rank, are shared anew by any number of them.
        """
        if self._shards is not None:
            reshard(self.model)
        states = [state] if isinstance(state, dict) else list(state)
        if len(states) > 1 or self._shards is not None:
            self.optimizer.load_state_dict(resharded(states, self.engine))
        else:
            self.optimizer.load_state_dict(states[0])

    def _entries(self, targets: list[Target]) -> Entries:
        """The entries of a run, none in training yet: of a sharded model those held here."""
        if self._shards is None:
            return Entries(targets, self.method.budget)
        return Entries(split_targets(targets, self._shards), self.method.budget, places=0)

    def close(self) -> None:
        """Let go of the model: hooks off, `requires_grad` as before, trained weights kept."""
        self.engine.close()
        for target in self.engine.entries.targets:
            target.close()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._requires_grad[name])
            parameter.grad = None
